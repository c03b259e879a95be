"""A bank of retrained models: what training on subsets gave, kept on disk, resumed, and shared out over processes."""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.evaluation.tables import flags
from funcghost.progress import progress

Run = Callable[[Tensor, int], Tensor]
"""`run(mask, seed)`: trains on the samples of the mask [n] from the seed, and gives what is to be kept, [q]."""


@dataclass(frozen=True, eq=False)
class Bank:
    """Outputs [m, s, q] of the models trained on the m subsets of `masks` [m, n] from each of s `seeds`."""

    masks: Tensor
    seeds: tuple[int, ...]
    outputs: Tensor

    @property
    def mean(self) -> Tensor:
        """The outputs averaged over seeds, [m, q]."""
        return self.outputs.mean(1)


def retrain(
    run: Run,
    masks: Tensor,
    seeds: Sequence[int] = (0,),
    *,
    folder: Path | str | None = None,
    made_of: str = "",
    processes: int = 1,
) -> Bank:
    """Trains a model for every subset and seed, or reads what a folder has of them.

    `run(mask, seed)` trains on the samples of `mask` and gives a tensor [q] of what is to be kept, the outputs on
    queries (or the parameters, flat). A function of its arguments alone; with `processes` above 1 one that can be
    pickled by its name, at the top level of a module.

    With a folder, every result is written as soon as it is there, and a later call goes on from it; processes, also of
    several machines that see the folder, may work on it at once. A result is found by the samples of its mask and its
    seed, so a bank can be extended; `made_of` says what else it depends on (model, data, steps), and a folder that says
    something else is refused.

    Shapes: `masks` [m, n] of bool; the outputs of the `Bank` are [m, s, q].

    Cost: one call of `run` for each result that is not there. Each process has one thread of torch.

    Raises:
        InputError: an argument is not what it must be, the folder is of something else, or results differ in shape.

    Example:
        >>> import torch
        >>> from funcghost import evaluation
        >>> masks = torch.tensor([[True, False], [True, True]])
        >>> evaluation.retrain(lambda mask, seed: mask.sum().float()[None] + seed, masks, seeds=[0, 10]).mean
        tensor([[6.],
                [7.]])
    """
    masks, seeds = flags("retrain: masks", masks, "mn").cpu(), tuple(seeds)
    if not len(masks) or not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int for seed in seeds):
        raise InputError("retrain: takes one mask or more, and one seed or more, whole numbers that differ.")
    if type(processes) is not int or processes < 1:
        raise InputError(f"retrain: processes must be 1 or more, found {processes!r}.")
    place = None if folder is None else _Folder(Path(folder), made_of, masks.shape[1])
    jobs = {(m, s): (masks[m], seed) for m in range(len(masks)) for s, seed in enumerate(seeds)}
    found: dict[tuple[int, int], Tensor] = {}
    if place is not None:
        found = {job: value for job, given in jobs.items() if (value := place.read(*given)) is not None}
    missing = {job: given for job, given in jobs.items() if job not in found}
    for job, value in progress(_ran(run, missing, processes), "retraining", "runs", len(missing)):
        if not isinstance(value, Tensor) or value.dim() != 1 or not value.is_floating_point():
            raise InputError(f"retrain: run(mask, seed) must give floating numbers [q], found {_named(value)}.")
        found[job] = value.detach().cpu()
        if place is not None:
            place.write(*jobs[job], found[job])
    lengths = {len(value) for value in found.values()}
    if len(lengths) > 1:
        raise InputError(f"retrain: results must all have the same length, found {sorted(lengths)}.")
    rows = [torch.stack([found[m, s] for s in range(len(seeds))]) for m in range(len(masks))]
    return Bank(masks, seeds, torch.stack(rows))


def _named(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


Job = tuple[int, int]


def _ran(run: Run, jobs: dict[Job, tuple[Tensor, int]], processes: int) -> Iterator[tuple[Job, Any]]:
    """The results, in the order in which they are done."""
    if processes == 1 or len(jobs) < 2:
        yield from ((job, run(*given)) for job, given in jobs.items())
        return
    # Threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), context, torch.set_num_threads, (1,)) as pool:
        # Numbers travel as arrays: shared memory of torch needs a file for each of them.
        waiting = {pool.submit(_called, run, mask.numpy(), seed): job for job, (mask, seed) in jobs.items()}
        try:
            for done in as_completed(waiting):
                found = done.result()
                yield waiting[done], torch.from_numpy(found) if isinstance(found, np.ndarray) else found
        finally:
            pool.shutdown(cancel_futures=True)


def _called(run: Run, mask: "np.ndarray[Any, Any]", seed: int) -> Any:
    found = run(torch.from_numpy(mask), seed)
    return found.detach().cpu().numpy() if isinstance(found, Tensor) else found


class _Folder:
    """One file for each result, written aside and renamed."""

    def __init__(self, path: Path, made_of: str, samples: int) -> None:
        self.path = path
        says = {"what": "funcghost retraining bank", "made_of": made_of, "samples": samples}
        label = path / "bank.json"
        path.mkdir(parents=True, exist_ok=True)
        if not label.exists():
            if any(path.glob("*.npy")):
                raise InputError(f"retrain: folder {path} has arrays and no bank.json: it is no bank. Take another.")
            self._put(label, json.dumps(says).encode())
        try:
            known = json.loads(label.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"retrain: {label} cannot be read ({error}). Take another folder.") from error
        if known != says:
            raise InputError(
                f"retrain: folder {path} is of {known}, this call is of {says}. Take another folder, or say the same."
            )

    def _file(self, mask: Tensor, seed: int) -> Path:
        digest = blake2b(np.packbits(mask.numpy()).tobytes(), digest_size=12).hexdigest()
        return self.path / f"{digest}-{seed}.npy"

    def read(self, mask: Tensor, seed: int) -> Tensor | None:
        """The result, if it is there."""
        file = self._file(mask, seed)
        if not file.exists():
            return None
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False))
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"retrain: {file} cannot be read ({error}). Remove it, and it is made anew.") from error

    def write(self, mask: Tensor, seed: int, value: Tensor) -> None:
        """Keeps a result."""
        with tempfile.SpooledTemporaryFile() as held:
            np.save(held, value.numpy(), allow_pickle=False)
            held.seek(0)
            self._put(self._file(mask, seed), held.read())

    def _put(self, file: Path, content: bytes) -> None:
        handle, aside = tempfile.mkstemp(dir=self.path, suffix=".part")
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        os.replace(aside, file)
