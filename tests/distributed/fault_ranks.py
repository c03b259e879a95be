"""Steps in which one rank does not do its part: what the others say, and what of a record is left.

`python -m tests.distributed.fault_ranks FOLDER` starts the ranks of every fault (forks of one process, since importing
is what takes time), and writes what each said to FOLDER/FAULT/RANK. By torchrun it is a rank of one fault, FOLDER
FAULT. All faults are of rank 1.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which FSDP2 imports when it is used: once here, in place of once in every rank
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import funcghost as fg
from funcghost import store
from funcghost.distributed import data_parallel, sharded, tensor_parallel
from tests.versions import SHARDS

RANKS, TIMEOUT = 2, timedelta(seconds=6)
STEPS, FAULTY = 4, 2


class Net(nn.Module):
    """Two layers, of which one may be called before the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.turned, self.other = False, False

    def forward(self, x: Tensor) -> Tensor:
        one, other = (self.second, self.first) if self.turned else (self.first, self.second)
        x = one(x)
        return other((x + x if self.other else x * 2).tanh() if not self.turned else x.tanh())


def prepared(strategy: str, net: Net, fault: Callable[[], None]) -> Any:
    """A step of one of the strategies, with the fault in its losses."""
    params = dict[str, Any]()

    def losses(given: Any, x: Tensor) -> Tensor:
        fault()
        out = torch.func.functional_call(net, given, (x,)) if strategy == "data parallel" else net(x)
        return out.square().sum(1)

    if strategy == "sharded":
        for part in (net.first, net.second, net):
            fully_shard(part)
        step = sharded.grad_and_reduce(losses, net)
    elif strategy == "tensor parallel":
        parallelize_module(
            net, init_device_mesh("cpu", (RANKS,)), {"first": ColwiseParallel(), "second": RowwiseParallel()}
        )
        step = tensor_parallel.grad_and_reduce(losses)
    else:
        step = data_parallel.grad_and_reduce(losses)
    params.update(net.named_parameters())
    return lambda x: step(params, x, fg.squared_norm())


def killed(net: Net) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(net: Net) -> None:
    time.sleep(60)


def raising(net: Net) -> None:
    raise ValueError("a fault of its own")


def turned(net: Net) -> None:
    net.turned = True


def otherwise(net: Net) -> None:
    net.other = True


FAULTS: dict[str, tuple[str, Callable[[Net], None], int]] = {
    # by name: the strategy, the fault, and the step in which it comes
    "killed": ("sharded", killed, FAULTY),
    "killed at first": ("data parallel", killed, 0),
    "hangs": ("sharded", hanging, FAULTY),
    "hangs, data parallel": ("data parallel", hanging, FAULTY),
    "raises": ("sharded", raising, FAULTY),
    "raises, data parallel": ("data parallel", raising, FAULTY),
    "raises at first, data parallel": ("data parallel", raising, 0),
    "raises at first, tensor parallel": ("tensor parallel", raising, 0),
    "other layers at first": ("sharded", turned, 0),
    "other layers": ("sharded", turned, FAULTY),
    "other ops, tensor parallel": ("tensor parallel", otherwise, 0),
}
if not SHARDS:
    FAULTS = {name: row for name, row in FAULTS.items() if row[0] != "sharded"}


def steps(name: str, folder: Path) -> None:
    """One rank: steps that are recorded, until the fault."""
    strategy, fault, when = FAULTS[name]
    rank, net, now = distributed.get_rank(), Net(), 0
    step = prepared(strategy, net, lambda: fault(net) if rank == 1 and now == when else None)
    with store.record(folder / f"values{rank}", ["norm"]) as kept:
        for now in range(STEPS):
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(now))
            kept.add(now, range(3), {"norm": step(x).reduced})
            kept.flush()


def run(name: str, rank: int, folder: Path) -> None:
    """A rank in a fork: what it says goes to a file."""
    sys.stderr = (folder / f"{rank}").open("w")
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS, timeout=TIMEOUT
        )
        steps(name, folder)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)


def main(folder: Path, names: list[str]) -> None:
    """All faults at once, since most of the time is waiting; a job ends as torchrun's does, with its first rank."""
    fork = get_context("fork")
    started = []
    for name in names:
        (folder / name).mkdir(parents=True)
        ranks = [fork.Process(target=run, args=(name, rank, folder / name)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        started.append(ranks)
    for ranks in started:
        ranks[0].join(40)
        for process in ranks:
            if process.is_alive():
                process.join(1)
                process.kill()


if __name__ == "__main__" and "RANK" in os.environ:
    distributed.init_process_group("gloo", timeout=TIMEOUT)
    steps(sys.argv[2], Path(sys.argv[1]))
elif __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(FAULTS))
