"""What optimizers do to one parameter, as pure functions that can be differentiated in everything.

A rule takes a parameter w [*], its gradient g and what the optimizer remembers, its slots, and says where w goes:

    w' = kept + move        kept: w, or what decoupled weight decay leaves of it

A rule agrees with `torch.optim` to rounding. Its derivatives are those of the mathematics, with two conventions: the
root of a second moment that is zero has the derivative 0, which is the limit of what the step does as the gradient
goes to zero (the first moment goes as fast as the root, their quotient by `eps`); and what rounds to bfloat16 has the
derivative of what it rounds. Slots and learning rates are tensors, so that derivatives go there, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcghost.errors import InputError

Slots = dict[str, Tensor]
"""What the optimizer remembers of one parameter, by torch's names, and its learning rate `lr`."""


class Moved(NamedTuple):
    """Where a parameter goes, `kept + move`, and the slots after the step."""

    kept: Tensor
    move: Tensor
    slots: Slots


class Rule(Protocol):
    """What an optimizer does to one parameter.

    `elementwise`: every entry of `move` depends on the entries of w, of g and of the slots at its own place alone; then
    `moved` and `from_memory` take any of the entries, and parameters of any shape.
    """

    @property
    def elementwise(self) -> bool:
        """Whether entries go by themselves."""

    def begin(self, param: Tensor) -> Slots:
        """The slots before the first step, without the learning rate."""

    def moved(self, param: Tensor, grad: Tensor, slots: Slots, *, rounded: bool = True) -> Moved:
        """The step; with `rounded=False` without the rounding that the optimizer adds on purpose."""

    def remembered(self, param: Tensor, grad: Tensor, slots: Slots) -> tuple[Tensor, float | Tensor]:
        """The linear memory after the step, and the sum of the weights with which a gradient ever enters a step."""

    def from_memory(self, param: Tensor, grad: Tensor, slots: Slots, memory: Tensor) -> Tensor:
        """The step that this memory makes, with denominators as they are in this step."""


def differentiated(value: Tensor) -> bool:
    """Whether a derivative may be taken of what is made of a value."""
    transformed = torch._C._functorch.maybe_current_level() is not None
    return value.requires_grad or transformed or forward_ad._current_level >= 0


def root(value: Tensor) -> Tensor:
    """The square root, with the derivative 0 at 0."""
    if not differentiated(value):
        return value.sqrt()
    zero = value == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, value).sqrt())


def ever(momentum: float) -> float:
    """`1 + momentum + momentum^2 + ...`."""
    if not momentum < 1:
        raise InputError(f"updates: with momentum {momentum:g} a gradient acts for ever, and its impulse has no end.")
    return 1 / (1 - momentum)


def counted(slots: Slots) -> Tensor:
    """The number of this step, from 1."""
    return slots["step"].detach() + 1


def decayed(grad: Tensor, param: Tensor, decay: float) -> Tensor:
    """The gradient with that of a quadratic penalty."""
    return torch.add(grad, param, alpha=decay) if decay else grad


def apart(param: Tensor, slots: Slots, decay: float) -> Tensor:
    """The parameter after weight decay that is no part of the gradient."""
    return param * (1 - slots["lr"] * decay) if decay else param


def mean_square(slots: Slots, name: str, grad: Tensor, beta: float) -> Tensor:
    """The running mean of squares after the step."""
    return torch.addcmul(beta * slots[name], grad, grad, value=1 - beta)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, dampening, Nesterov's form and weight decay.

        b' = momentum b + (1 - dampening) g        (the first: b' = g)
        move = - lr b', or - lr (g + momentum b') with Nesterov

    Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning", as
    `torch.optim.SGD` has it.
    """

    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    maximize: bool
    elementwise: ClassVar[bool] = True

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "SGD":
        """From an optimizer's group."""
        return cls(
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=group["nesterov"],
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
        )

    def begin(self, param: Tensor) -> Slots:
        """The slots before the first step."""
        if not self.momentum:
            return {}
        slots = {"momentum_buffer": torch.zeros_like(param)}
        # The first gradient is not dampened: whether there was one has to be known.
        return slots | ({"started": torch.zeros((), dtype=torch.float64)} if self.dampening else {})

    def _buffer(self, param: Tensor, grad: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        grad = decayed(-grad if self.maximize else grad, param, self.weight_decay)
        if not self.momentum:
            return grad, grad
        weight = 1 - self.dampening * slots["started"].detach() if self.dampening else 1.0
        return grad, self.momentum * slots["momentum_buffer"] + weight * grad

    def moved(self, param: Tensor, grad: Tensor, slots: Slots, *, rounded: bool = True) -> Moved:
        """The step."""
        grad, buffer = self._buffer(param, grad, slots)
        along = grad + self.momentum * buffer if self.nesterov else buffer
        after = dict(slots)
        if self.momentum:
            after["momentum_buffer"] = buffer
            if self.dampening:
                after["started"] = torch.ones_like(slots["started"])
        return Moved(param, -slots["lr"] * along, after)

    def remembered(self, param: Tensor, grad: Tensor, slots: Slots) -> tuple[Tensor, float | Tensor]:
        """The memory after the step, and how much of a gradient is ever in it."""
        sign = -1.0 if self.maximize else 1.0
        return self._buffer(param, grad, slots)[1], sign * (1 - self.dampening) * ever(self.momentum)

    def from_memory(self, param: Tensor, grad: Tensor, slots: Slots, memory: Tensor) -> Tensor:
        """The step that this memory makes."""
        return -slots["lr"] * memory


@dataclass(frozen=True)
class RMSprop:
    """A step by the gradient over the root of its mean square, centered if asked for, with momentum on the quotient.

        s' = alpha s + (1 - alpha) g^2        q = g / (sqrt(s' [- mean(g)^2]) + eps)        b' = momentum b + q

    Source: Tieleman, Hinton, lecture 6.5 of "Neural Networks for Machine Learning"; Graves (arXiv 1308.0850) centered.
    """

    alpha: float
    eps: float
    momentum: float
    centered: bool
    weight_decay: float
    maximize: bool
    elementwise: ClassVar[bool] = True

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "RMSprop":
        """From an optimizer's group."""
        return cls(
            alpha=float(group["alpha"]),
            eps=float(group["eps"]),
            momentum=float(group["momentum"]),
            centered=group["centered"],
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
        )

    def begin(self, param: Tensor) -> Slots:
        """The slots before the first step."""
        given = {"square_avg": True, "momentum_buffer": self.momentum > 0, "grad_avg": self.centered}
        return {name: torch.zeros_like(param) for name, needed in given.items() if needed}

    def _quotient(self, param: Tensor, grad: Tensor, slots: Slots) -> tuple[Slots, Tensor, Tensor]:
        """The slots after the step but for momentum, the gradient with its decay, and the denominator."""
        grad = decayed(-grad if self.maximize else grad, param, self.weight_decay)
        square = mean_square(slots, "square_avg", grad, self.alpha)
        after = slots | {"square_avg": square}
        if self.centered:
            mean = after["grad_avg"] = torch.lerp(slots["grad_avg"], grad, 1 - self.alpha)
            square = torch.addcmul(square, mean, mean, value=-1)
        return after, grad, root(square) + self.eps

    def moved(self, param: Tensor, grad: Tensor, slots: Slots, *, rounded: bool = True) -> Moved:
        """The step."""
        after, grad, denominator = self._quotient(param, grad, slots)
        along = grad / denominator
        if self.momentum:
            along = after["momentum_buffer"] = self.momentum * slots["momentum_buffer"] + along
        return Moved(param, -slots["lr"] * along, after)

    def remembered(self, param: Tensor, grad: Tensor, slots: Slots) -> tuple[Tensor, float | Tensor]:
        """The memory after the step, and how much of a gradient is ever in it."""
        sign = -1.0 if self.maximize else 1.0
        return self._quotient(param, grad, slots)[1], sign * ever(self.momentum)

    def from_memory(self, param: Tensor, grad: Tensor, slots: Slots, memory: Tensor) -> Tensor:
        """The step that this memory makes."""
        return -slots["lr"] * (memory / self._quotient(param, grad, slots)[2])
