#!/usr/bin/env bash
# kronfluence's pairwise scores of a layer that is called twice count the last call alone.
#
# Versions: torch 2.13.0, numpy 2.4.6, kronfluence 1.0.1; CPU, Python 3.11.
# Guess: has_shared_parameters=True makes the scores of a reused layer exact.
# Seen: without it a score is the product of the last calls; with it, all calls of the query times the last call
#   of the training sample. No setting gives the product of the two gradients.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 kronfluence==1.0.1
cat > shown.py <<'PYTHON'
import importlib.metadata
import logging
import warnings

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.utils.data import TensorDataset

warnings.filterwarnings("ignore")
print("kronfluence", importlib.metadata.version("kronfluence"), "torch", torch.__version__)
torch.manual_seed(0)


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Squares(Task):
    def compute_train_loss(self, batch, model, sample=False):
        return model(batch[0]).square().sum()

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


x, queries = torch.randn(7, 4), torch.randn(3, 4)
model = Twice()
weights = list(model.layer.parameters())


def gradients(x):
    rows = [torch.autograd.grad(model(sample).square().sum(), weights) for sample in x]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


truth = gradients(queries) @ gradients(x).T
model = prepare_model(model, Squares())
found = {}
for shared in (False, True):
    analyzer = Analyzer("shown", model, Squares(), cpu=True, output_dir=f"out{shared}", disable_tqdm=True)
    analyzer.logger.setLevel(logging.ERROR)
    strategy = FactorArguments(strategy="identity", has_shared_parameters=shared)
    analyzer.fit_all_factors("none", TensorDataset(x), per_device_batch_size=7, factor_args=strategy)
    sets = TensorDataset(queries), TensorDataset(x)
    analyzer.compute_pairwise_scores("scores", "none", *sets, 3, 7, score_args=ScoreArguments())
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    found[shared] = ((scores - truth).norm() / truth.norm()).item()
print(f"off by {found[False]:.3f}; with has_shared_parameters=True by {found[True]:.3f}")
assert min(found.values()) > 0.01, "the scores are right"
PYTHON
venv/bin/python shown.py
