#!/usr/bin/env bash
# Under functional_call with other values, a checkpointed module gives the right loss and a wrong gradient.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, Python 3.11.
# Guess: the recomputation in the backward takes the values that the forward took, or torch raises
#   CheckpointError.
# Seen: the module is recomputed with its own parameters, which are back in place by then; shapes agree, so
#   nothing is said. The gradient is off by more than its own norm. Per-sample gradients at a checkpoint of the
#   training, and metagradients, of models with gradient checkpointing (in transformers, use_reentrant=False is
#   the default) are what this hurts.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import torch
from torch.utils.checkpoint import checkpoint

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
print("torch", torch.__version__)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
        self.checkpointed = True

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)


net, x = Net(), torch.randn(4, 3)
others = {name: torch.randn_like(p).requires_grad_() for name, p in net.named_parameters()}


def gradient(checkpointed):
    net.checkpointed = checkpointed
    loss = torch.func.functional_call(net, others, (x,)).square().sum()
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(others.values()))])


(loss, found), (same, truth) = gradient(True), gradient(False)
off = ((found - truth).norm() / truth.norm()).item()
print(f"losses {loss:.6f} and {same:.6f}; the gradient is off by {off:.2f} of its norm")
assert torch.equal(loss, same)
assert off > 0.1, "the gradient is right"
PYTHON
venv/bin/python shown.py
