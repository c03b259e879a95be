"""The losses of an `nn.Module`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from funcghost.errors import InputError
from funcghost.problem import Losses
from funcghost.trees import Tree, is_distributed


def module_losses(
    model: nn.Module, criterion: Callable[[Any, Tree], Tensor], inputs: Callable[[Tree], Any] | None = None
) -> Losses:
    """The losses of a module: `losses(params, batch) = criterion(model(batch), batch)`, by `functional_call`.

    Calls `model(**batch)` for a mapping, `model(*batch)` for a tuple or list, otherwise `model(batch)`. With `inputs`,
    the model is called on `inputs(batch)` instead, in the same way: `inputs=lambda batch: batch[0]` for the pairs
    `(x, y)` of a loader, of which the criterion takes `batch[1]`. The criterion gives [b]. Parameters of the model that
    are not in `params` stay as they are in the model, and so do its buffers and its training mode. A model
    whose parameters are DTensors is called as it is, on its own parameters alone.

    Raises:
        InputError: (when used) params are no dict of names, or are not a sharded model's own, or the model does not
            take what it is called with.

    Example:
        >>> import funcghost as fg, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> losses = fg.module_losses(model, lambda output, batch: output.square().sum(1))
        >>> losses(dict(model.named_parameters()), torch.ones(3, 2)).shape
        torch.Size([3])
    """

    def losses(params: Tree, batch: Tree) -> Tensor:
        if not isinstance(params, Mapping):
            raise InputError(
                f"module_losses: params must be a dict from the names of the model's parameters to tensors, found "
                f"{type(params).__name__}. Pass dict(model.named_parameters())."
            )
        given = batch if inputs is None else inputs(batch)
        named = dict(given) if isinstance(given, Mapping) else {}
        args: tuple[Any, ...] = tuple(given) if isinstance(given, tuple | list) else (given,)
        if isinstance(given, Mapping):
            args = ()
        if inputs is None:
            _check_call(model, args, named)
        if any(map(is_distributed, params.values())):
            _check_own(model, params)
            return criterion(model(*args, **named), batch)
        return criterion(functional_call(model, dict(params), args, named), batch)

    return losses


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that require gradients, by name: the `params` of a step on a model that is fine-tuned.

    Losses such as `fg.module_losses(model, criterion)` take the frozen ones from the module itself.

    Raises:
        InputError: all of them are frozen.

    Example:
        >>> import funcghost as fg, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 1))
        >>> list(fg.trainable(model))
        ['1.weight', '1.bias']
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"trainable: takes a torch.nn.Module, found {type(model).__name__}.")
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise InputError(
            f"trainable: no parameter of {type(model).__name__} requires gradients. Unfreeze those to train first, "
            "e.g. by parameter.requires_grad_()."
        )
    return found


def _check_own(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Whether params are the very parameters of the model, as far as these are not unsharded at the moment."""
    own = dict(model.named_parameters())
    for name, value in params.items():
        found = own.get(name)
        unsharded = getattr(found, "device_mesh", None) != getattr(value, "device_mesh", None)
        if found is None or (found is not value and not unsharded):
            raise InputError(
                f"module_losses: params[{name!r}] is sharded, and not the model's own parameter of that name. Such a "
                "model runs on its own parameters: pass dict(model.named_parameters()), and write other values into "
                "these first."
            )


def _check_call(model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Whether the model takes a batch as it is."""
    try:
        bind = inspect.signature(model.forward).bind
    except (TypeError, ValueError):  # a forward that says nothing of its arguments
        return
    try:
        bind(*args, **named)
    except TypeError as error:
        raise InputError(
            f"module_losses: {type(model).__name__}.forward does not take the batch, {len(args) or len(named)} "
            f"arguments: {error}. Say which of it are the model's, e.g. inputs=lambda batch: batch[0] for (x, y), and "
            "take the others in the criterion."
        ) from None
