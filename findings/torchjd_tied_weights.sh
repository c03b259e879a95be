#!/usr/bin/env bash
# torchjd's Gramian lacks the cross terms of two modules that share a weight.
#
# Versions: torch 2.13.0, numpy 2.4.6, torchjd 0.18.0; CPU, Python 3.11.
# Guess: the engine sums what both modules give to the shared parameter before it multiplies, or refuses.
# Seen: the Gramian is off by a third: each module's own Gramian is added, without the products of one use with
#   the other. Every language model whose head is tied to its embedding has these. One module called twice is
#   right.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchjd==0.18.0
cat > shown.py <<'PYTHON'
import importlib.metadata

import torch
from torchjd.autogram import Engine

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
print("torchjd", importlib.metadata.version("torchjd"), "torch", torch.__version__)
embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
model = torch.nn.Sequential(embedding, head)
tokens, targets = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 2, 0, 4])


def off():
    losses = lambda: torch.nn.functional.cross_entropy(model(tokens), targets, reduction="none")
    params, values = list(model.parameters()), losses()
    rows = [torch.autograd.grad(value, params, retain_graph=True) for value in values]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    truth, found = jacobian @ jacobian.T, Engine(model, batch_dim=0).compute_gramian(losses())
    return ((found - truth).norm() / truth.norm()).item()


apart = off()
head.weight = embedding.weight
tied = off()
print(f"Gramian off by {apart:.1e} of its norm with two weights, by {tied:.2f} with one in both modules")
assert apart < 1e-12
assert tied > 0.1, "the Gramian is right"
PYTHON
venv/bin/python shown.py
