"""Tensor parallel models: every rank has a share of the parameters, and the same samples as the others.

    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    losses = lambda params, batch: cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    params = dict(model.named_parameters())  # some of them DTensors
    out = tensor_parallel.grad_and_reduce(losses)(params, batch, {"score": fg.dot(direction)})

Ops on DTensors are computed by all ranks of a mesh together. Where such an op is scored, its inputs, its output
gradient and the direction are gathered, and every rank computes what one process would: a sum over shares is taken
once, and what is the same on all ranks is counted once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.overrides import TorchFunctionMode

from funcghost.algebra.pairs import Pairs
from funcghost.distributed.collectives import told_by_all
from funcghost.distributed.faults import named
from funcghost.engine.plans import Plan
from funcghost.errors import InputError
from funcghost.laws.draws import repeated, sample_weights
from funcghost.options import Options
from funcghost.problem import Losses, Problem, Reduction, backward
from funcghost.side_effects import untouched
from funcghost.transforms.compiling import uncompiled
from funcghost.transforms.steps import Step, Transform
from funcghost.trees import Params, Tree, is_distributed, split_params, tensors


def grad_and_reduce(
    losses: Losses,
    *,
    reduction: Reduction = "mean",
    has_aux: bool = False,
    options: Options | None = None,
    plan: Plan | None = None,
) -> Callable[..., Step]:
    """`fg.grad_and_reduce` with DTensors among params: of `parallelize_module`, or of a pure function of one's own.

    Law: losses, reduced values and gradients are, on every rank, those of one process with the whole parameters;
    gradients are DTensors placed as the parameters are.

    All ranks of the mesh pass the same batch, and the losses return the same [b] on each, as an ordinary tensor
    (`.full_tensor()`). Directions are trees like params: DTensors or whole tensors. Parameters that are ordinary
    tensors must have the same gradient on all ranks, as those in replicated layers have; once for every structure of
    params that is checked, and that the losses agree. With several groups of ranks that each have samples of their own,
    gradients are those of a group's own samples.

    Args:
        losses: as in `fg.grad_and_reduce`.
        reduction: as in `fg.grad_and_reduce`.
        has_aux: as in `fg.grad_and_reduce`.
        options: as in `fg.grad_and_reduce`.
        plan: as in `fg.grad_and_reduce`.

    Units: as in `fg.grad_and_reduce`. Cost: on every rank the FLOPs of one process for what is scored, and the bytes of
    inputs and output gradients of all ops on DTensors, and of their directions: it saves memory, not work.

    Raises:
        InputError: the losses are DTensors, or ranks do not agree on them or on the gradient of an ordinary parameter;
            and as `fg.grad_and_reduce`.
        RankError: another rank ended or hangs.
    """
    if reduction not in ("mean", "sum"):
        raise InputError(f"tensor_parallel.grad_and_reduce: reduction must be 'mean' or 'sum', found {reduction!r}.")
    return InPartsTransform(losses, reduction, has_aux, options, plan).step


def reduce(losses: Losses, *, options: Options | None = None, plan: Plan | None = None) -> Callable[..., Tree]:
    """Reduced per-sample gradients alone, as `fg.reduce`: arguments and errors are those of `grad_and_reduce`."""
    step = InPartsTransform(losses, None, False, options, plan).step
    return lambda params, batch, reducers=None: step(params, batch, reducers).reduced


def pairs(losses: Losses, *, options: Options | None = None, plan: Plan | None = None) -> Callable[[Tree, Tree], Pairs]:
    """The per-sample gradients in factored form, as `fg.pairs`: factors are whole on every rank."""
    pairs_and_losses = InPartsTransform(losses, None, False, options, plan).pairs
    return lambda params, batch: pairs_and_losses(params, batch)[0]


class InParts(Problem):
    """Losses that ranks compute together, with DTensors among the parameters."""

    @property
    def in_parts(self) -> bool:
        """They do."""
        return True

    @contextmanager
    def at(self, values: Sequence[Tensor]) -> Iterator[Problem]:
        """As that of a problem; a DTensor has its share of the other values, in its own memory."""
        rows = list(zip(self.params.leaves, values, strict=True))
        kept = [leaf.to_local().detach().clone() if isinstance(leaf, DTensor) else None for leaf in self.params.leaves]
        with super().at([leaf if isinstance(leaf, DTensor) else value for leaf, value in rows]) as moved:
            try:
                with torch.no_grad():
                    for leaf, value in rows:
                        if isinstance(leaf, DTensor) and leaf is not value:
                            leaf.to_local().copy_(share_of(value, leaf))
                yield moved
            finally:
                with torch.no_grad():
                    for leaf, own in zip(self.params.leaves, kept, strict=True):
                        if isinstance(leaf, DTensor) and own is not None:
                            leaf.to_local().copy_(own)

    def evaluate(self, leaves: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The losses [b], which every rank must have as a whole."""
        losses, aux = super().evaluate(leaves)
        if is_distributed(losses):
            raise InputError(
                "losses: must return an ordinary tensor [b], the same on every rank, found a DTensor. Return "
                "losses.full_tensor(); under loss_parallel, leave loss_parallel out."
            )
        return losses, aux

    def backward(
        self, losses: Tensor, wanted: Sequence[Tensor], cotangent: Tensor, keep_graph: bool = False
    ) -> list[Tensor]:
        """As that of a problem; the gradient of a DTensor is placed as it is."""
        found = backward(losses, wanted, cotangent, keep_graph)
        return [
            gradient.redistribute(own.device_mesh, own.placements)
            if isinstance(own, DTensor) and isinstance(gradient, DTensor)
            else gradient
            for gradient, own in zip(found, wanted, strict=True)
        ]


def share_of(value: Tensor, leaf: DTensor) -> Tensor:
    """This rank's share of a whole tensor that all ranks have, or of a DTensor, placed as the leaf is."""
    mesh, placements = leaf.device_mesh, leaf.placements
    if isinstance(value, DTensor):
        return value.redistribute(mesh, placements).to_local()
    return distribute_tensor(value.detach(), mesh, placements, src_data_rank=None).to_local()


class InPartsTransform(Transform):
    """A transform of losses that ranks compute together."""

    def __init__(
        self, losses: Losses, reduction: Reduction | None, has_aux: bool, options: Options | None, plan: Plan | None
    ) -> None:
        super().__init__(losses, reduction, has_aux, options, plan)
        self.one_op = None  # ranks compute the losses together
        self._agreed = set[Any]()

    def problem(self, params: Tree, batch: Tree) -> Problem:
        """The losses at these parameters, on this batch."""
        return InParts(self.losses, split_params(params), batch, self.has_aux)

    def step(self, params: Tree, batch: Tree, reducers: Tree = None) -> Step:
        """As that of a transform."""
        with self._together(params, batch):
            return super().step(params, batch, reducers)

    def pairs(self, params: Tree, batch: Tree) -> tuple[Pairs, Tensor]:
        """As that of a transform."""
        with self._together(params, batch):
            return super().pairs(params, batch)

    @contextmanager
    def _together(self, params: Tree, batch: Tree) -> Iterator[None]:
        """Ranks that agree on what they compute; what is not a DTensor is the same on all of them."""
        groups = _groups(split_params(params))
        with named("tensor_parallel", groups[0] if len(groups) == 1 else None):
            self._agree(params, batch)
            with implicit_replication():
                yield

    def _agree(self, params: Tree, batch: Tree) -> None:
        """Ranks compare, where the structure of params is new, what must be the same on all of them.

        Costs a step as a user would take it, with his own mixture of tensors and DTensors.
        """
        problem = self.problem(params, batch)
        leaves = problem.params.leaves
        structure = problem.params.names, tuple((leaf.shape, isinstance(leaf, DTensor)) for leaf in leaves)
        if structure not in self._agreed:
            with uncompiled():
                check_agreement(problem)
            self._agreed.add(structure)


def check_agreement(problem: Problem) -> None:
    """The ops, the batch, the losses, and the gradients of ordinary parameters are the same on all ranks of the meshes.

    Raises:
        InputError: naming what is not.
    """
    with untouched(problem.devices()):
        leaves = problem.leaves()
        with _Ops() as ops:
            losses, _ = problem.evaluate(leaves)
        gradients = problem.backward(losses, leaves, sample_weights(losses))
    own = {"the losses": _sketch(losses)}
    for number, given in enumerate(tensors(problem.batch)):
        own[f"tensor {number} of the batch"] = [] if is_distributed(given) else _sketch(given)
    for name, leaf, gradient in zip(problem.params.names, leaves, gradients, strict=True):
        if not isinstance(leaf, DTensor):
            own[f"the gradient of params[{name!r}]"] = _sketch(gradient)
    for group in _groups(problem.params):
        for rank, (others, other) in enumerate(told_by_all((ops.names, own), group)):
            if others != ops.names:
                apart = [pair for pair in zip_longest(ops.names, others) if pair[0] != pair[1]]
                raise InputError(
                    f"tensor_parallel: the losses run other ops than those on rank {rank} of the mesh ({apart[0][0]} "
                    f"here, {apart[0][1]} there), and ranks compute ops together. Let all run the same code."
                )
            for what, numbers in own.items():
                size = max(map(abs, (*numbers, *other[what])), default=0.0)
                if not all(abs(a - b) <= 1e-3 * size for a, b in zip(numbers, other[what], strict=True)):
                    raise InputError(
                        f"tensor_parallel: {what} must be the same on all ranks of a mesh, and differs from that on "
                        f"rank {rank} of it. Pass the same batch on all of them; of an ordinary parameter that meets "
                        "shares of activations (a norm of heads, a scale between column and row parallel layers) make "
                        "a DTensor, by SequenceParallel or distribute_tensor(..., [Replicate()])."
                    )


class _Ops(TorchFunctionMode):
    """The names of what is called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", type(func).__name__))
        return func(*args, **(kwargs or {}))


def _sketch(value: Tensor) -> list[float]:
    """A few numbers that tell tensors apart: projections on fixed random vectors."""
    flat = value.detach().to_dense().double().flatten()
    drawn = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(flat.device)
    return [float((flat * repeated(row, flat.shape)).sum()) for row in drawn]


def _groups(params: Params) -> list[distributed.ProcessGroup]:
    """The groups of ranks along every axis of every mesh that parameters lie on."""
    meshes = {leaf.device_mesh for leaf in params.leaves if isinstance(leaf, DTensor)}
    if not meshes:
        raise InputError(
            "tensor_parallel: no parameter is a DTensor. Use fg.grad_and_reduce or funcghost.distributed.data_parallel."
        )
    groups = [mesh.get_group(axis) for mesh in meshes for axis in range(mesh.ndim)]
    return list({group.group_name: group for group in groups}.values())
