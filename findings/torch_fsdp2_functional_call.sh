#!/usr/bin/env bash
# Under fully_shard, functional_call ignores the values that it is given, or keeps them for good.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, gloo, one process, Python 3.11.
# Guess: the model runs on the values given, or raises.
# Seen: after a first plain forward the values given make no difference. If the call is the very first forward, they
#   are used, named_parameters() lists the old ones after it, and a plain forward runs on the new ones. Losses at other
#   parameters (line searches, Hessian-vector products by differences, validation after a step) are computed at the
#   wrong point, without a word.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call

print("torch", torch.__version__)
distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
mesh, x = init_device_mesh("cpu", (1,)), torch.ones(1, 3)


def output(net, values=None):
    with torch.no_grad():
        return float(net(x) if values is None else functional_call(net, values, (x,)))


def sharded():
    net = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False))
    torch.nn.init.ones_(net[0].weight)
    fully_shard(net[0], mesh=mesh, reshard_after_forward=True)
    fully_shard(net, mesh=mesh)
    return net, {name: torch.zeros_like(leaf) for name, leaf in net.named_parameters()}


net, zeros = sharded()
found = output(net), output(net, zeros)
print("first a plain forward, then functional_call with zeros:", found)
assert found == (3.0, 3.0), "the values given are used"

net, zeros = sharded()
found = output(net, zeros), float(next(net.parameters()).full_tensor().detach().sum()), output(net)
print("first functional_call with zeros, the sum of the weights after it, then a plain forward:", found)
assert found == (0.0, 3.0, 0.0), "the values given are used once, or not at all"
distributed.destroy_process_group()
PYTHON
venv/bin/python shown.py
