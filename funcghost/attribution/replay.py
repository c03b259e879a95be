"""A training that can be gone through backwards: some states are kept, the others recomputed and verified."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcghost.errors import InputError, ReplayError
from funcghost.problem import Losses, Problem, Reduction, backward, cotangents
from funcghost.progress import progress
from funcghost.side_effects import RandomState, random_state, replaying
from funcghost.trees import Params, Tree, split_params

Update = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
"""`update(params, grads, state) -> (params, state)`: a differentiable step of an optimizer."""


@dataclass(frozen=True, eq=False)
class Moment:
    """Where a training is before a step: parameters, the optimizer's state, and torch's random numbers."""

    params: Params
    state: Tree
    random: RandomState


class _Look(TorchDispatchMode):
    """Notes the dtypes of less than 32 bits that ops compute in, and the bytes of the largest tensor they give."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.largest = set[torch.dtype](), 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in optree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel() * leaf.itemsize)
                if leaf.is_floating_point() and leaf.dtype.itemsize < 4:
                    self.narrow.add(leaf.dtype)
        return out


@dataclass(eq=False)
class Training:
    """A training over batches, and what is kept of it: every so many moments, and the losses of all steps.

    `largest` is how many bytes the largest tensor of the first step has.

    Gone through forwards and backwards under the same kernels, which whoever goes through it sees to.
    """

    losses: Losses
    update: Update
    batches: Sequence[Tree]
    reduction: Reduction
    every: int
    folder: Path | None
    kept: dict[int, Moment] = field(default_factory=dict)
    reads: dict[int, Callable[[], Moment]] = field(default_factory=dict)
    found: list[Tensor] = field(default_factory=list)
    largest: int = 1

    def run(self, params: Tree, state: Tree) -> tuple[Params, Tree]:
        """Trains; the parameters and the state at the end."""
        now, devices = split_params(params), Problem(self.losses, split_params(params), None).devices()
        for step in progress(range(len(self.batches)), "unrolled: training", "steps"):
            moment = Moment(now, state, random_state(devices))
            if step % self.every == 0:
                self._keep(step, moment)
            now, state, losses = self._step(step, moment, look=step == 0)
            self.found.append(losses)
        return now, state

    def backwards(self) -> Iterator[tuple[int, Moment]]:
        """The moments before all steps, the last first.

        Raises:
            ReplayError: the losses of a step that is recomputed are not those of the training.
        """
        for start in reversed(range(0, len(self.batches), self.every)):
            segment = [self._kept(start)]
            for step in range(start, min(start + self.every, len(self.batches)) - 1):
                with replaying(segment[-1].random):
                    now, state, losses = self._step(step, segment[-1])
                    self.verify(step, losses)
                    segment.append(Moment(now, state, random_state([d for d, _ in segment[-1].random])))
            for step in reversed(range(start, start + len(segment))):
                yield step, segment.pop()
            self.kept.pop(start, None)

    def verify(self, step: int, losses: Tensor) -> None:
        """Holds the losses of a step to those of the training."""
        known = self.found[step]
        if losses.shape != known.shape or not torch.equal(losses, known):
            off = float((losses - known).abs().max()) if losses.shape == known.shape and len(known) else float("nan")
            raise ReplayError(
                f"unrolled: step {step} gave other losses when it was run again (off by {off:.3g}). Losses and update "
                "must depend on their arguments and torch's random numbers alone, and batches[i] be the same each "
                "time: no generator of its own in the data, no buffers that are written to. On a GPU, use "
                "torch.use_deterministic_algorithms(True)."
            )

    def _step(self, step: int, moment: Moment, look: bool = False) -> tuple[Params, Tree, Tensor]:
        """One step; with a `look`, low precision on the way is refused, and sizes are noted."""
        problem, seen = Problem(self.losses, moment.params, self.batches[step]), _Look()
        with seen if look else nullcontext():
            leaves = problem.leaves()
            values, _ = problem.evaluate(leaves)
            gradients = backward(values, leaves, cotangents(values, self.reduction))
            with torch.no_grad():
                result = self.update(moment.params.rebuild(leaves), moment.params.rebuild(gradients), moment.state)
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputError("unrolled: update(params, grads, state) must return (params, state).")
        if seen.narrow:
            raise InputError(
                f"unrolled: the losses or the update compute in {', '.join(sorted(map(str, seen.narrow)))}. "
                "Rounding of that size is not part of the derivative, and what a long training makes of it drowns the "
                "scores: train in float32 or float64 for this."
            )
        self.largest = max(self.largest, seen.largest)
        after = split_params(result[0])
        if after.names != moment.params.names:
            raise InputError("unrolled: update must return a tree like params.")
        detached = tuple(leaf.detach() for leaf in after.leaves)
        return Params(after.names, detached, moment.params.spec), _detached(result[1]), values.detach()

    def _keep(self, step: int, moment: Moment) -> None:
        if self.folder is None:
            self.kept[step] = moment
            return
        leaves, spec = optree.tree_flatten(moment.state, none_is_leaf=True)
        content = {
            "params": [leaf.detach() for leaf in moment.params.leaves],
            "state": [leaf for leaf in leaves if isinstance(leaf, Tensor)],
            "random": [value for _, value in moment.random],
        }
        aside = self._file(step).with_suffix(".part")
        torch.save(content, aside)
        aside.replace(self._file(step))
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        at = [isinstance(leaf, Tensor) for leaf in leaves]
        like = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]

        def read() -> Moment:
            found = torch.load(self._file(step), weights_only=True)
            saved = iter(value.to(device) for value, device in zip(found["state"], like, strict=True))
            state = [next(saved) if tensor else other for tensor, other in zip(at, others, strict=True)]
            random = [(device, value) for (device, _), value in zip(devices, found["random"], strict=True)]
            params = Params(names, tuple(found["params"]), tree)
            return Moment(params, optree.tree_unflatten(spec, state), random)

        names, tree = moment.params.names, moment.params.spec
        devices = [(device, None) for device, _ in moment.random]
        self.reads[step] = read

    def _kept(self, step: int) -> Moment:
        return self.kept[step] if self.folder is None else self.reads[step]()

    def _file(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step{step}.pt"


def _detached(tree: Tree) -> Tree:
    return optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree, none_is_leaf=True)
