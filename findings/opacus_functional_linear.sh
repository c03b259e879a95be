#!/usr/bin/env bash
# opacus leaves out uses of a weight that are no call of a module: a head by F.linear(x, embedding.weight).
#
# Versions: torch 2.13.0, numpy 2.4.6, opacus 1.6.0; CPU, Python 3.11.
# Guess: GradSampleModule refuses such a use, or its per-sample gradients sum to .grad.
# Seen: only the embedding's own use is counted, without a word; the sum over the samples is off from .grad by
#   more than its norm. GPTs of one's own often write their tied head so. Clipping such gradients does not bound a
#   sample's influence.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 opacus==1.6.0
cat > shown.py <<'PYTHON'
import importlib.metadata
import warnings

import torch
from opacus import GradSampleModule

warnings.filterwarnings("ignore", message="Full backward hook is firing")
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
print("opacus", importlib.metadata.version("opacus"), "torch", torch.__version__)


class Tied(torch.nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        self.head.weight, self.functional = self.embedding.weight, functional

    def forward(self, tokens):
        x = self.embedding(tokens).tanh()
        return torch.nn.functional.linear(x, self.embedding.weight) if self.functional else self.head(x)


def off(functional):
    model = GradSampleModule(Tied(functional), loss_reduction="sum")
    tokens, targets = torch.tensor([[0, 1], [2, 1], [3, 4]]), torch.tensor([[1, 2], [0, 4], [0, 0]])
    logits = model(tokens).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum").backward()
    weight = model._module.embedding.weight
    return ((weight.grad_sample.sum(0) - weight.grad).norm() / weight.grad.norm()).item()


module, functional = off(False), off(True)
print(f"sum of per-sample gradients against .grad: off by {module:.1e} by modules, by {functional:.2f} by F.linear")
assert module < 1e-12
assert functional > 0.1, "the per-sample gradients are right"
PYTHON
venv/bin/python shown.py
