#!/usr/bin/env bash
# A tensor that NumPy has looked at once can never be freed by fully_shard, long after the array is gone.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, gloo, one process, Python 3.11.
# Guess: torch refuses to resize memory while an array shares it, and not after the array was deleted.
# Seen: `.numpy()` marks the memory as not resizable for good. A look at an unsharded parameter of a model under
#   fully_shard (a logged statistic of `param[:8].numpy()`) makes the next reshard, in the same forward, raise
#   "Trying to resize storage that is not resizable".
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import gc

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

print("torch", torch.__version__)
distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
logged = []


class Looked(torch.nn.Linear):
    def forward(self, x):
        logged.append(float(self.weight.detach()[0].numpy().mean()))
        gc.collect()
        return super().forward(x)


net = torch.nn.Sequential(Looked(3, 3), torch.nn.Linear(3, 1))
mesh = init_device_mesh("cpu", (1,))
for part in (*net, net):
    fully_shard(part, mesh=mesh, reshard_after_forward=True)
said = ""
try:
    net(torch.ones(1, 3))
except RuntimeError as error:
    said = str(error).splitlines()[0]
print("a mean was logged:", logged, "then:", said)
assert "not resizable" in said, "the parameter is freed"
distributed.destroy_process_group()
PYTHON
venv/bin/python shown.py
