#!/usr/bin/env bash
# Under fully_shard, ranks that call layers of one size in different orders compute with a mixture of both, silently.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, gloo, two processes, Python 3.11.
# Guess: an error, as the ranks gather different parameters; or each rank's own layers, as its program says.
# Seen: the all-gathers of the two ranks are matched by their order and size alone. Rank 0, which calls `a` first, gets
#   its own half of `a` and rank 1's half of `b`, which that rank calls first. No error, no warning: each rank goes on
#   with weights that no layer has. A branch that depends on a rank's data (an expert, a skipped layer) does this.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import datetime

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank, mesh = distributed.get_rank(), init_device_mesh("cpu", (2,))
layers = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in "ab"})
for name, value in (("a", 1.0), ("b", 10.0)):
    torch.nn.init.constant_(layers[name].weight, value)
    fully_shard(layers[name], mesh=mesh)
with torch.no_grad():
    for name in "ab" if rank == 0 else "ba":
        found = layers[name](torch.ones(1, 2)).tolist()
        print("torch", torch.__version__, "rank", rank, "layer", name, "gives", found, flush=True)
        own, other = (2.0, 20.0) if name == "a" else (20.0, 2.0)
        wanted = [[own, other]] if rank == 0 else [[other, own]]
        assert found == wanted, f"not a mixture of the halves of both layers: {found}"
distributed.destroy_process_group()
PYTHON
timeout 120 venv/bin/python -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 shown.py
