"""What a `Trainer` runs in, seen from one of its processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from funcghost.distributed.collectives import several
from funcghost.errors import InputError

GATHERS = ("gather", "gather_for_metrics", "reduce")
"""Methods of an accelerator which talk to other processes."""


def alone(model: Any) -> Any:
    """The model as one process has it: without `DistributedDataParallel`, which waits for a backward of its own.

    What is compiled around it is left out along with it.
    """
    wrapped = getattr(model, "_orig_mod", model)
    return wrapped.module if isinstance(wrapped, DistributedDataParallel) else model


def told_processes(trainer: Any) -> dict[str, bool]:
    """Ways to run on many devices for which values are not right, and whether the trainer runs that way."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    parallel = config is not None and (config.tp_enabled or config.cp_enabled or config.sp_enabled)
    handler = trainer.accelerator.ddp_handler
    hook = getattr(handler, "comm_hook", None)
    return {
        "several devices in one process (torch.nn.DataParallel: start it by torchrun)": trainer.args.n_gpu > 1,
        "FSDP of version 1 (set fsdp_config={'version': 2})": trainer.is_fsdp_enabled
        and not trainer.accelerator.is_fsdp2,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "tensor, context or sequence parallel": parallel or trainer.get_tp_size() > 1,
        "a ddp_comm_hook, which changes the gradients that ranks exchange": str(getattr(hook, "value", "no")) != "no",
    }


@contextmanager
def gathering(accelerator: Any, *, refused: bool) -> Iterator[None]:
    """A training step gathers nothing: it runs more often than by itself, and not in every process alike.

    Raises:
        InputError: (within) it does, and that is refused; else it is given its own.
    """
    if not several(None):
        yield
        return

    def own(value: Any, *args: Any, **kwargs: Any) -> Any:
        if refused:
            raise InputError(
                "the training step gathers over processes (accelerator.gather, .gather_for_metrics or .reduce), which "
                "is of other processes' samples. Let compute_loss be made of its own process's batch; where the "
                "gathered is for the logs alone, set gathers_for_logs = True in the class."
            )
        return torch.atleast_1d(value) if isinstance(value, torch.Tensor) else value

    kept = {name: vars(accelerator).get(name) for name in GATHERS}
    for name in GATHERS:
        setattr(accelerator, name, own)
    try:
        yield
    finally:
        for name, method in kept.items():
            if method is None:
                delattr(accelerator, name)
            else:
                setattr(accelerator, name, method)
