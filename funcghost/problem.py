"""What is differentiated: the losses of a batch at given parameters, and their gradient by autograd."""

from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, is_dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from funcghost.control_flow import as_python, is_traced
from funcghost.dtypes import as_written
from funcghost.errors import InputError, MismatchError, UnsupportedOpError
from funcghost.trees import Params, Tree, check_whole, tensors

Losses = Callable[[Tree, Tree], Any]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be differentiated: the losses at given parameters on a given batch."""

    losses: Losses
    params: Params
    batch: Tree
    has_aux: bool = False

    def __post_init__(self) -> None:
        """Every rank has all of what it differentiates."""
        if not self.in_parts:
            check_whole(self.params)

    @property
    def in_parts(self) -> bool:
        """Whether ops are computed by several ranks together, on DTensors."""
        return False

    @property
    def in_step(self) -> bool:
        """Whether other ranks go through the same run, which therefore has to be gone through to its end."""
        return False

    def settle(self, unfit: MismatchError | None, sizes: Any, count: int) -> None:
        """Ends a forward of `count` samples, before its backward; `sizes` are those of its ops.

        Raises:
            MismatchError: the run does not fit the plan.
        """
        if unfit is not None:
            raise unfit

    def backward(
        self, losses: Tensor, wanted: Sequence[Tensor], cotangent: Tensor, keep_graph: bool = False
    ) -> list[Tensor]:
        """The gradient of `<losses, cotangent>`, as `backward`."""
        return backward(losses, wanted, cotangent, keep_graph)

    def devices(self) -> list[torch.device]:
        """The devices of the parameters and of the batch."""
        return list({tensor.device for tensor in (*self.params.leaves, *tensors(self.batch))})

    def is_meta(self) -> bool:
        """Whether there are no values to measure."""
        return any(leaf.is_meta for leaf in self.params.leaves)

    def leaves(self) -> list[Tensor]:
        """What is differentiated: the user's own leaves that require gradients, and fresh ones for other parameters.

        The losses may come to a parameter by another way than `params`: a second reference, a module that runs again in
        a backward, a hook. To its own leaf, all of them lead. Fresh leaves share memory with the parameters.
        """
        return [leaf if is_own(leaf) else leaf.detach().requires_grad_() for leaf in self.params.leaves]

    @contextmanager
    def at(self, values: Sequence[Tensor]) -> Iterator["Problem"]:
        """The same problem with other values of the parameters; the user's own leaves have them for as long."""
        leaves = self.params.leaves
        kept = [
            leaf.detach() if is_own(leaf) and leaf is not value else None
            for leaf, value in zip(leaves, values, strict=True)
        ]
        there = tuple(value if own is None else leaf for leaf, own, value in zip(leaves, kept, values, strict=True))
        try:
            for leaf, own, value in zip(leaves, kept, values, strict=True):
                if own is not None:
                    leaf.data = value.detach()
            yield replace(self, params=self.params._replace(leaves=there))
        finally:
            for leaf, own in zip(leaves, kept, strict=True):
                if own is not None:
                    leaf.data = own

    def evaluate(self, leaves: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The losses [b] and the auxiliary output."""
        with torch.enable_grad(), as_python():
            try:
                out = self.losses(self.params.rebuild(leaves), containers(self.batch))
            except RuntimeError as error:
                if not str(error).startswith("Creating a new Tensor subclass"):
                    raise
                raise UnsupportedOpError(
                    f"losses: make a tensor of a class of its own, which torch refuses while writes are watched "
                    f"({error}). Make it once, outside of the losses, and close over it."
                ) from error
        if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise InputError(f"losses: with has_aux=True it must return (losses, aux), found {type(out).__name__}.")
        values, aux = out if self.has_aux else (out, None)
        check_losses(values)
        return values, aux


def containers(batch: Tree) -> Tree:
    """The same leaves in containers of their own, so that losses may take something out of them, or put something in.

    Raises:
        InputError: the batch is an iterator, which the losses of one run would use up for the next.
    """
    if isinstance(batch, Iterator):
        raise InputError(
            f"batch: is an iterator ({type(batch).__name__}), which one run of the losses uses up, and a step may run "
            "them several times. Pass one batch, such as next(iter(loader)), or list(batch)."
        )
    if isinstance(batch, Tensor):
        return batch
    leaves, spec = optree.tree_flatten(batch, none_is_leaf=True)
    return optree.tree_unflatten(spec, map(_own, leaves))


def _own(leaf: Any) -> Any:
    """A shallow copy of a container that optree does not know, such as a tokenizer's output or a dataclass."""
    known = isinstance(leaf, MutableMapping | MutableSequence | MutableSet | SimpleNamespace)
    return copy(leaf) if known or (is_dataclass(leaf) and not isinstance(leaf, type)) else leaf


def is_own(leaf: Tensor) -> bool:
    """Whether autograd can be asked for the gradient of this very tensor; not while a compiler traces."""
    return leaf.requires_grad and leaf.is_leaf and not is_traced()


def check_losses(values: Any) -> None:
    """Losses must be one real number per sample."""
    if not isinstance(values, Tensor):
        hint = " Pass has_aux=True if it returns (losses, aux)." if isinstance(values, tuple) else ""
        raise InputError(f"losses: must return a tensor [b], found {type(values).__name__}.{hint}")
    if values.dim() != 1:
        raise InputError(
            f"losses: must return one number per sample, a tensor [b], found shape {tuple(values.shape)}. "
            "Reduce over everything but the samples, e.g. reduction='none' and .flatten(1).mean(1)."
        )
    if not values.is_floating_point():
        raise InputError(f"losses: must be real floating-point numbers, found {values.dtype}.")


def check_depends(losses: Tensor) -> None:
    """Losses must have a graph."""
    if not losses.requires_grad:
        raise InputError(
            "losses: do not depend on params. Call the model with the params handed in, e.g. by "
            "torch.func.functional_call or fg.module_losses, and not under torch.no_grad()."
        )


def cotangents(losses: Tensor, reduction: Reduction) -> Tensor:
    """The gradient of the reduced losses with respect to the losses, [b]."""
    return torch.full_like(losses, 1 / losses.shape[0] if reduction == "mean" and losses.shape[0] else 1.0)


@contextmanager
def backwards(device: torch.device) -> Iterator[None]:
    """Where backwards of the losses run: out of the caller's autocast, with errors that say what to do.

    Raises:
        UnsupportedOpError: a checkpointed region cannot be run again.
    """
    try:
        with as_written(device):
            yield
    except CheckpointError as error:
        raise UnsupportedOpError(
            "torch.utils.checkpoint recomputed a region differently. Pass context_fn=fg.checkpoint_context to "
            "checkpoint(..., use_reentrant=False), and let params be the module's own tensors "
            "(dict(model.named_parameters())), since that is what a recomputed module sees."
        ) from error
    except RuntimeError as error:
        if "selective activation checkpoint" not in str(error):
            raise
        raise UnsupportedOpError(
            "a region of torch.utils.checkpoint keeps a selection of its ops (create_selective_checkpoint_contexts), "
            "and torch lets it be run again for one backward alone, where a plan takes several. While samples are "
            "scored, checkpoint the whole region: checkpoint(..., use_reentrant=False, "
            "context_fn=fg.checkpoint_context)."
        ) from error


def backward(losses: Tensor, wanted: Sequence[Tensor], cotangent: Tensor, keep_graph: bool = False) -> list[Tensor]:
    """The gradient of `<losses, cotangent>`; zeros where the losses do not depend on something."""
    if not losses.requires_grad:
        return [torch.zeros_like(leaf, requires_grad=False) for leaf in wanted]
    with backwards(losses.device):
        found = torch.autograd.grad(losses, wanted, cotangent, retain_graph=keep_graph, allow_unused=True)
    return [
        torch.zeros_like(leaf, requires_grad=False) if gradient is None else gradient.detach()
        for gradient, leaf in zip(found, wanted, strict=True)
    ]


def graph_nodes(losses: Tensor) -> Iterator[Any]:
    """All nodes of autograd's graph behind the losses."""
    todo, seen = [losses.grad_fn], set[Any]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(child for child, _ in node.next_functions)


def detached(aux: Tree) -> Tree:
    """The auxiliary output without its graph."""
    if aux is None:
        return None
    return optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux)
