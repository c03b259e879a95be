#!/usr/bin/env bash
# SGD with momentum and differentiable=True drops the derivative of the first step.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, Python 3.11.
# Guess: the derivative through the optimizer's steps is that of what the optimizer computes, as it is for Adam.
# Seen: after three steps, d(weight)/d(scale of the loss) is -0.468 where finite differences give -0.936: the
#   buffer starts as a detached copy of the first gradient. Without momentum, and for Adam, both agree.
#   Metagradients through SGD are what this hurts; a momentum buffer of zeros set beforehand is the way around.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import warnings

import torch

warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
torch.set_default_dtype(torch.float64)
print("torch", torch.__version__)


def trained(scale, optimizer):
    """The weight after three steps on scale * (w - 1)^2 / 2 from w = 3."""
    w = torch.tensor([3.0], requires_grad=True).clone()
    made = optimizer([w])
    for _ in range(3):
        loss = scale * (w.clone() - 1).square().sum() / 2
        (w.grad,) = torch.autograd.grad(loss, w, create_graph=True)
        made.step()
    return w.sum()


def both(optimizer):
    scale = torch.tensor(1.0, requires_grad=True)
    (derivative,) = torch.autograd.grad(trained(scale, optimizer), scale)
    ends = [trained(torch.tensor(1 + e, requires_grad=True), optimizer).item() for e in (1e-5, -1e-5)]
    return derivative.item(), (ends[0] - ends[1]) / 2e-5


plain = both(lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True))
momentum = both(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, differentiable=True))
print("without momentum: autograd %.4f, finite differences %.4f" % plain)
print("momentum 0.9:     autograd %.4f, finite differences %.4f" % momentum)
assert abs(plain[0] - plain[1]) < 1e-6
assert abs(momentum[0] - momentum[1]) > 0.1, "the derivative is right"
PYTHON
venv/bin/python shown.py
