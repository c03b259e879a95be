#!/usr/bin/env bash
# In dattri, the options given to one attributor change those of every other in the process, earlier ones too.
#
# Versions: torch 2.13.0, numpy 2.4.6, dattri 0.3.0; CPU, Python 3.11.
# Guess: projector_kwargs belong to the attributor that they were given to.
# Seen: all TracInAttributors share one dictionary of defaults, and each updates it: after another was made with
#   proj_type="identity", the scores of the first move by 0.14 of their norm here. Comparisons of settings in one
#   process compare the last setting with itself.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 dattri==0.3.0
cat > shown.py <<'PYTHON'
import importlib.metadata

import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch.utils.data import DataLoader, TensorDataset

print("dattri", importlib.metadata.version("dattri"), "torch", torch.__version__)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))


def loss(params, sample):
    x, y = sample
    out = torch.func.functional_call(model, params, (x[None],))
    return torch.nn.functional.cross_entropy(out, y[None])


task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
train, test = (
    DataLoader(TensorDataset(torch.randn(n, 8), torch.randint(3, (n,))), batch_size=n) for n in (7, 3)
)


def scores(attributor):
    with torch.no_grad():
        return attributor.attribute(train, test)


def made(**options):
    return TracInAttributor(task=task, weight_list=torch.ones(1), normalized_grad=False, **options)


first = made()
before, again = scores(first), scores(first)
made(projector_kwargs={"proj_type": "identity"})  # another attributor, not used
after = scores(first)
moved = ((after - before).norm() / before.norm()).item()
print(f"the first attributor's scores, asked again: moved by {((again - before).norm() / before.norm()).item():.1e}")
print(f"after another was made: moved by {moved:.2f} of their norm")
assert torch.equal(before, again)
assert moved > 0.05, "the options are the attributor's own"
PYTHON
venv/bin/python shown.py
