"""The rule of Muon, whose step is orthogonalized momentum."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcghost.training.update_rules import Moved, Slots, apart, differentiated


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """About `U V^T` of the singular value decomposition `U S V^T`, by Newton and Schulz's iteration in this dtype.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks".
    """
    a, b, c = coefficients
    value = matrix.to(dtype)
    tall = value.shape[0] > value.shape[1]
    value = value.T if tall else value
    value = value / torch.linalg.vector_norm(value).clamp(min=eps)
    for _ in range(steps):
        gram = value @ value.T
        value = torch.addmm(value, torch.addmm(gram, gram, gram, beta=b, alpha=c), value, beta=a)
    return (value.T if tall else value).to(matrix.dtype)


@dataclass(frozen=True)
class Muon:
    """Momentum, orthogonalized; weight decay is decoupled.

        b' = momentum b + (1 - momentum) g        u = b', or momentum b' + (1 - momentum) g with Nesterov
        move = - lr scale(shape) orthogonalized(u)

    torch iterates in bfloat16: so does `moved`, with the derivative of the iteration in the dtype of the parameter.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"; Liu et al. (arXiv 2502.16982).
    """

    momentum: float
    nesterov: bool
    coefficients: tuple[float, float, float]
    eps: float
    steps: int
    adjusted: str | None
    weight_decay: float
    elementwise: ClassVar[bool] = False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Muon":
        """From an optimizer's group."""
        a, b, c = map(float, group["ns_coefficients"])
        return cls(
            momentum=float(group["momentum"]),
            nesterov=group["nesterov"],
            coefficients=(a, b, c),
            eps=float(group["eps"]),
            steps=group["ns_steps"],
            adjusted=group["adjust_lr_fn"],
            weight_decay=float(group["weight_decay"]),
        )

    def begin(self, param: Tensor) -> Slots:
        """The slots before the first step."""
        return {"momentum_buffer": torch.zeros_like(param)}

    def _scale(self, rows: int, columns: int) -> float:
        if self.adjusted == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1, rows / columns)) if self.adjusted in (None, "original") else 1.0

    def _along(self, grad: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        buffer = torch.lerp(slots["momentum_buffer"], grad, 1 - self.momentum)
        return buffer, torch.lerp(grad, buffer, self.momentum) if self.nesterov else buffer

    def moved(self, param: Tensor, grad: Tensor, slots: Slots, *, rounded: bool = True) -> Moved:
        """The step."""
        buffer, along = self._along(grad, slots)
        kept = apart(param, slots, self.weight_decay)
        return Moved(kept, self._step(slots, along, rounded), slots | {"momentum_buffer": buffer})

    def _step(self, slots: Slots, along: Tensor, rounded: bool) -> Tensor:
        settings = self.coefficients, self.steps, self.eps
        traced = differentiated(along)
        exact = orthogonalized(along, *settings, along.dtype) if traced or not rounded else None
        found = orthogonalized(along.detach(), *settings, torch.bfloat16) if rounded else exact
        assert found is not None
        if rounded and exact is not None:
            found = found + (exact - exact.detach())  # adds zero, with a derivative
        return -slots["lr"] * self._scale(*along.shape) * found

    def remembered(self, param: Tensor, grad: Tensor, slots: Slots) -> tuple[Tensor, float | Tensor]:
        """The memory after the step, and how much of a gradient is ever in it."""
        return self._along(grad, slots)[1], 1.0

    def from_memory(self, param: Tensor, grad: Tensor, slots: Slots, memory: Tensor) -> Tensor:
        """The step that this memory makes."""
        return self._step(slots, memory, rounded=False)
