#!/usr/bin/env bash
# The third derivative of layer_norm is silently wrong, and so is the second by reverse over forward mode.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, Python 3.11.
# Guess: torch raises where an op cannot be differentiated so often, and is right where it does not raise.
# Seen: the formula for the backward of the backward takes mean and rstd as constants. The third derivative along
#   a line is 0.0870 where the same formula in elementary ops, and finite differences, give 0.5313; grad of a jvp,
#   a second derivative, is 0.5019 for 0.4302. batch_norm in training mode is wrong alike. Gradients of Hessian-
#   vector products and of per-sample scores are what this hurts.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import torch
from torch.func import grad, jvp

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, v, u, w = (torch.randn(5) for _ in range(4))
print("torch", torch.__version__)


def fused(x):
    return (torch.nn.functional.layer_norm(x, (5,)) * w).sum().sin()


def batch_norm(x):
    return (torch.nn.functional.batch_norm(x[:, None], None, None, training=True)[:, 0] * w).sum().sin()


def by_hand(x):
    centred = x - x.mean()
    return (centred / (centred.square().mean() + 1e-5).sqrt() * w).sum().sin()


def slopes(function):
    """First, second and third derivative along v, by reverse mode; the second by reverse over forward mode."""
    along = lambda t: function(x + t * v)
    first, zero = grad(along), torch.zeros(())
    second = grad(first)
    mixed = grad(lambda t: jvp(along, (t,), (torch.ones(()),))[1])
    return [d(zero).item() for d in (first, second, grad(second), mixed)]


def near(a, b):
    return abs(a - b) < 1e-4 * abs(b)


truth = slopes(by_hand)
step = 1e-3
second = [grad(grad(lambda t: fused(x + t * v)))(torch.tensor(s)).item() for s in (step, -step)]
by_differences = (second[0] - second[1]) / (2 * step)
print("third derivative by differences of the second", by_differences)
assert near(truth[2], by_differences)
for function in (fused, batch_norm):
    found = slopes(function)
    print(f"{function.__name__:10} first {found[0]:.4f} second {found[1]:.4f} third {found[2]:.4f} grad(jvp) {found[3]:.4f}")
    assert near(found[0], truth[0]) and near(found[1], truth[1])
    assert not near(found[2], truth[2]), "the third derivative is right"
    assert not near(found[3], truth[1]), "grad(jvp) is right"
print(f"{'by hand':10} first {truth[0]:.4f} second {truth[1]:.4f} third {truth[2]:.4f} grad(jvp) {truth[3]:.4f}")
PYTHON
venv/bin/python shown.py
