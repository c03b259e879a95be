#!/usr/bin/env bash
# torch.matmul copies one matrix for every sample, where it stands for all of them and is taken in pieces.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, Python 3.11.
# Guess: [8, 1, pieces, 1, k] @ [1, pieces, k, n] reads the one matrix eight times, as it does where there are no pieces.
# Seen: the matrix is expanded over the eight and then flattened together with its pieces, which no view can be: it is
#   copied eight times. For a linear layer of 25088 by 4096 that is 3.3 GB. With the eight as rows of one matrix,
#   [pieces, 8, k] @ [pieces, k, n], nothing is copied.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PYTHON'
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.shapes.append(tuple(found.shape))
        return found


samples, pieces, k, n = 8, 4, 16, 32
rows, matrix = torch.randn(samples, 1, 1, pieces * k), torch.randn(1, pieces * k, n)
with Copies() as whole:
    wanted = torch.matmul(rows, matrix)
with Copies() as apart:
    found = torch.matmul(rows.unflatten(-1, (pieces, k)).movedim(-2, -3), matrix.unflatten(-2, (pieces, k))).sum(-3)
torch.testing.assert_close(found, wanted)
print("torch", torch.__version__, "copied for the whole:", whole.shapes, "in pieces:", apart.shapes)
assert whole.shapes == [], "the whole matrix is copied, too"
assert any(shape[0] == samples and shape[-2:] == (k, n) for shape in apart.shapes), "no copy for every sample any more"
PYTHON
