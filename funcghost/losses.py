"""Ways to write `losses(params, batch) -> [b]`."""

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call

from funcghost.run import Losses
from funcghost.trees import Tree


def per_example(
    loss: Callable[[Tree, Tree], Tensor],
    in_dims: Any = 0,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Losses:
    """The losses of a batch from the loss of one example: `out[i] = loss(params, batch[i])`, by `torch.func.vmap`.

    Shapes: `loss(params, example)` gives a scalar; the result gives [b], where b is the size of the axes `in_dims`
    of the batch (an int, or a tree of ints and None like the batch).

    The samples cannot mix here, and every op has its sample axis. `randomness` and `chunk_size` are those of
    `torch.func.vmap`: "different" draws other random numbers for each example.

    Example:
        >>> import funcghost as fg, torch
        >>> losses = fg.per_example(lambda params, x: (x @ params["w"]).square())
        >>> losses({"w": torch.tensor([1.0, 2.0])}, torch.eye(2))
        tensor([1., 4.])
    """

    def losses(params: Tree, batch: Tree) -> Tensor:
        leaves, spec = optree.tree_flatten(batch)
        dims = optree.broadcast_prefix(in_dims, batch, none_is_leaf=True)

        def of_leaves(params: Tree, leaves: list[Any]) -> Tensor:
            return loss(params, optree.tree_unflatten(spec, leaves))

        values: Tensor = torch.func.vmap(of_leaves, (None, dims), randomness=randomness, chunk_size=chunk_size)(
            params, leaves
        )
        return values

    return losses


def module_losses(model: nn.Module, criterion: Callable[[Any, Tree], Tensor]) -> Losses:
    """The losses of a module: `losses(params, batch) = criterion(model(batch), batch)`, by `functional_call`.

    Calls `model(**batch)` for a mapping, `model(*batch)` for a tuple or list, otherwise `model(batch)`. The criterion
    gives [b]. Parameters of the model that are not in `params` stay as they are in the model, and so do its buffers
    and its training mode.

    Example:
        >>> import funcghost as fg, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> losses = fg.module_losses(model, lambda output, batch: output.square().sum(1))
        >>> losses(dict(model.named_parameters()), torch.ones(3, 2)).shape
        torch.Size([3])
    """

    def losses(params: Tree, batch: Tree) -> Tensor:
        if isinstance(batch, Mapping):
            output = functional_call(model, params, (), dict(batch))
        elif isinstance(batch, tuple | list):
            output = functional_call(model, params, tuple(batch))
        else:
            output = functional_call(model, params, (batch,))
        return criterion(output, batch)

    return losses
