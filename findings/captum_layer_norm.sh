#!/usr/bin/env bash
# captum's TracInCP with sample_wise_grads_per_batch leaves out the parameters of LayerNorm.
#
# Versions: torch 2.13.0, numpy 2.4.6, captum 0.9.0; CPU, Python 3.11.
# Guess: sample_wise_grads_per_batch is a matter of speed: the scores are the same, or a layer that is not known
#   is refused.
# Seen: without it the scores are exact; with it those of Linear layers alone, and nothing is said. Every
#   transformer has LayerNorms.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 captum==0.9.0
cat > shown.py <<'PYTHON'
import importlib.metadata
import warnings

import torch
from captum.influence import TracInCP
from torch.utils.data import TensorDataset

warnings.filterwarnings("ignore")
print("captum", importlib.metadata.version("captum"), "torch", torch.__version__)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
torch.save(model.state_dict(), "checkpoint.pt")
x, y, test_x, test_y = torch.randn(7, 4), torch.randint(3, (7,)), torch.randn(2, 4), torch.randint(3, (2,))


def load(model, path):
    model.load_state_dict(torch.load(path))
    return 1.0


def gradients(x, y, params):
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def scores(sample_wise):
    loss = torch.nn.CrossEntropyLoss(reduction="sum" if sample_wise else "none")
    options = {"loss_fn": loss, "batch_size": 7, "sample_wise_grads_per_batch": sample_wise}
    made = TracInCP(model, TensorDataset(x, y), ["checkpoint.pt"], load, **options)
    return made.influence((test_x, test_y))


def off(found, params):
    truth = gradients(test_x, test_y, params) @ gradients(x, y, params).T
    return ((found - truth).norm() / truth.norm()).item()


every, linear = list(model.parameters()), [*model[0].parameters(), *model[2].parameters()]
plain, sample_wise = scores(False), scores(True)
print(f"sample_wise_grads_per_batch=False: off by {off(plain, every):.1e}")
print(f"True: off by {off(sample_wise, every):.2f}; by {off(sample_wise, linear):.1e} without the LayerNorm")
assert off(plain, every) < 1e-10
assert off(sample_wise, linear) < 1e-10
assert off(sample_wise, every) > 0.01, "the LayerNorm is counted"
PYTHON
venv/bin/python shown.py
