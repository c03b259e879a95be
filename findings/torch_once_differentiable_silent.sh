#!/usr/bin/env bash
# A backward marked once_differentiable is left out of second derivatives without an error, if there is another way.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, Python 3.11.
# Guess: torch.autograd.function.once_differentiable raises when something is differentiated twice.
# Seen: it raises where the second derivative is taken in what the Function saw. In the incoming gradient c, as for
#   <grad(c), v> by c (how a J v product is had of two backwards), the error node has no way to c: with y = 5 x + 2 x,
#   the second by such a Function, the gradient is 7 c and its derivative in c comes out as 5, not 7, without an
#   error. Where the Function is the only way, c "appears to not have been used", and allow_unused=True, the usual
#   answer to that, gives None.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import torch
from torch.autograd.function import once_differentiable


class Twofold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def gradient(function):
    x, c = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(function(x), x, c, create_graph=True)
    return found, c


print("torch", torch.__version__)
found, c = gradient(lambda x: 5 * x + Twofold.apply(x))
(slope,) = torch.autograd.grad(found, c, torch.ones(3))
print("gradient", found.tolist(), "its derivative in the incoming gradient", slope.tolist())
assert found.tolist() == [7.0] * 3
assert slope.tolist() == [5.0] * 3

found, c = gradient(Twofold.apply)
try:
    torch.autograd.grad(found, c, torch.ones(3))
except RuntimeError as error:
    print("alone:", error)
    assert "not have been used" in str(error)
else:
    raise AssertionError("no error")
alone = torch.autograd.grad(found, c, torch.ones(3), allow_unused=True)
print("alone, allow_unused:", alone)
assert alone == (None,)
PYTHON
venv/bin/python shown.py
