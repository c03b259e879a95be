#!/usr/bin/env bash
# `detach()` of what a table with sharded rows gives takes the sum over ranks, and the tensor cannot be used after it.
#
# Versions: torch 2.15.0 (2.14.1 does it, too; 2.13.0 does not), numpy 2.4.6; CPU, gloo, two processes, Python 3.11.
# Guess: the same values, placed as they were, without a word to other ranks; the tensor itself stays what it is.
# Seen: F.embedding(ids, table) with the rows of the table on two ranks is a partial sum, masked on each rank. Its
#   detach() is replicated: it has been summed over ranks, in a message. The mask went with it: whatever asks for the
#   values of the tensor itself then fails with an AssertionError without text. view_as leaves both as they are.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
table = distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [Shard(0)])
ids = distribute_tensor(torch.tensor([0, 3]), mesh, [Replicate()])

found = F.embedding(ids, table)
before, detached = found.placements, found.detach()
print("torch", torch.__version__, before, "detached:", detached.placements, detached.to_local().tolist(), flush=True)
assert not before[0].is_replicate(), "the table's output is no partial sum any more"
assert detached.placements == (Replicate(),), f"detach leaves it as it is: {detached.placements}"
try:
    again = found.full_tensor()
except AssertionError as error:
    print("the tensor itself:", repr(error), flush=True)
else:
    assert False, f"the tensor can still be used: {again}"

viewed = F.embedding(ids, table)
assert viewed.view_as(viewed).placements[0].is_partial()
assert viewed.full_tensor().tolist() == [[0.0, 1.0], [6.0, 7.0]]
distributed.destroy_process_group()
PYTHON
timeout 120 venv/bin/python -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 shown.py
