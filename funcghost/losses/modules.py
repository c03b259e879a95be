"""The losses of an `nn.Module`."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from funcghost.errors import InputError
from funcghost.problem import Losses
from funcghost.trees import Tree


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
