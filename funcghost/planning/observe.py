"""The identity that shows a meter the output gradient, where a hook cannot."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcghost.ops.call import alias


class Observe(torch.autograd.Function):
    """`Observe.apply(see, output) -> output`; the backward calls `see(gradient)`, with the physical batch."""

    @staticmethod
    def forward(see: Callable[[Tensor], None], value: Tensor) -> Tensor:
        """The output as it is."""
        return alias(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the observer."""
        ctx.see = inputs[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """Shows the gradient and passes it on."""
        ctx.see(gradient)
        return None, gradient

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        """An identity in forward mode, too."""
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], see: Callable[[Tensor], None], value: Tensor) -> tuple[Tensor, int]:
        """The same for the physical batch, the vmapped axis first."""
        return Observe.apply(see, value.movedim(in_dims[1], 0)), 0
