#!/usr/bin/env bash
# The jvp of a custom autograd.Function, within another torch.func.jvp: what it computes has no tangent of its own.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, Python 3.11.
# Guess: a Function whose forward and jvp are those of a product by two can stand for that product in a jvp of a jvp, as
#   it can in one jvp and in a gradient of a jvp; or torch says that it cannot.
# Seen: the tangent that jvp computes is a constant to the outer jvp. The second derivative of exp(sin(x)) loses the part
#   that goes through it, and nothing is said. Returned as it came, without any op on it, a tangent keeps its own.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PYTHON'
import torch


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


x = torch.linspace(-1, 1, 3, dtype=torch.float64)
along = torch.ones_like(x)


def slope(double):
    return lambda x: torch.func.jvp(lambda x: torch.exp(double(torch.sin(x)) / 2), (x,), (along,))[1]


def bend(double):
    return torch.func.jvp(slope(double), (x,), (along,))[1]


exact = (x.cos().square() - x.sin()) * x.sin().exp()
plain, own = bend(lambda x: 2 * x), bend(Twice.apply)
by_gradient = torch.func.grad(lambda x: slope(Twice.apply)(x).sum())(x)
print("torch", torch.__version__, "exact:", exact.tolist(), "own:", own.tolist())
torch.testing.assert_close(slope(Twice.apply)(x), slope(lambda x: 2 * x)(x))
torch.testing.assert_close(plain, exact)
torch.testing.assert_close(by_gradient, exact)
assert not own.allclose(exact), "the second jvp is right now"
torch.testing.assert_close(own, x.cos().square() * x.sin().exp())
PYTHON
