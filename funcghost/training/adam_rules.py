"""The rules of Adam and its kin."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcghost.training.update_rules import Moved, Slots, apart, counted, decayed, mean_square, root


@dataclass(frozen=True)
class Adam:
    """Adam, and AdamW where weight decay is `decoupled`.

        m' = beta1 m + (1 - beta1) g        v' = beta2 v + (1 - beta2) g^2
        move = - lr (m' / (1 - beta1^t)) / (sqrt(v' / (1 - beta2^t)) + eps)

    Source: Kingma, Ba (arXiv 1412.6980); Loshchilov, Hutter (arXiv 1711.05101); Reddi, Kale, Kumar for `amsgrad`.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool
    maximize: bool
    elementwise: ClassVar[bool] = True

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Adam":
        """From an optimizer's group."""
        beta1, beta2 = map(float, group["betas"])
        return cls(
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )

    def begin(self, param: Tensor) -> Slots:
        """The slots before the first step."""
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))
        return {"step": torch.zeros((), dtype=torch.float64)} | {name: torch.zeros_like(param) for name in names}

    def _moments(self, param: Tensor, grad: Tensor, slots: Slots) -> tuple[Slots, Tensor]:
        """The slots after the step, and the denominator."""
        grad = -grad if self.maximize else grad
        grad = grad if self.decoupled else decayed(grad, param, self.weight_decay)
        after = slots | {"step": counted(slots), "exp_avg": torch.lerp(slots["exp_avg"], grad, 1 - self.beta1)}
        second = after["exp_avg_sq"] = mean_square(slots, "exp_avg_sq", grad, self.beta2)
        if self.amsgrad:
            second = after["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], second)
        return after, root(second) / (1 - self.beta2 ** after["step"]).sqrt() + self.eps

    def _rate(self, after: Slots) -> Tensor:
        return after["lr"] / (1 - self.beta1 ** after["step"])

    def moved(self, param: Tensor, grad: Tensor, slots: Slots, *, rounded: bool = True) -> Moved:
        """The step."""
        after, denominator = self._moments(param, grad, slots)
        kept = apart(param, slots, self.weight_decay) if self.decoupled else param
        return Moved(kept, -self._rate(after) * (after["exp_avg"] / denominator), after)

    def remembered(self, param: Tensor, grad: Tensor, slots: Slots) -> tuple[Tensor, float | Tensor]:
        """The memory after the step, and how much of a gradient is ever in it."""
        return self._moments(param, grad, slots)[0]["exp_avg"], -1.0 if self.maximize else 1.0

    def from_memory(self, param: Tensor, grad: Tensor, slots: Slots, memory: Tensor) -> Tensor:
        """The step that this memory makes."""
        after, denominator = self._moments(param, grad, slots)
        return -self._rate(after) * (memory / denominator)


@dataclass(frozen=True)
class NAdam:
    """Adam with Nesterov's momentum: the step is a mean of g and of m', each with its own correction.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam", as `torch.optim.NAdam` has it.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    momentum_decay: float
    maximize: bool
    elementwise: ClassVar[bool] = True

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "NAdam":
        """From an optimizer's group."""
        beta1, beta2 = map(float, group["betas"])
        return cls(
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
            momentum_decay=float(group["momentum_decay"]),
            maximize=group["maximize"],
        )

    def begin(self, param: Tensor) -> Slots:
        """The slots before the first step."""
        # torch rounds the product of momenta to float32 in every step.
        counts = {"step": torch.zeros((), dtype=torch.float64), "mu_product": torch.ones((), dtype=torch.float32)}
        return counts | {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}

    def _momentum(self, step: Tensor) -> Tensor:
        return self.beta1 * (1 - 0.5 * 0.96 ** (step * self.momentum_decay))

    def _moments(
        self, param: Tensor, grad: Tensor, slots: Slots
    ) -> tuple[Slots, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The slots after the step, the gradient with its decay, the denominator, and the rates of g and of m'."""
        grad = -grad if self.maximize else grad
        grad = grad if self.decoupled else decayed(grad, param, self.weight_decay)
        step = counted(slots)
        now, following = self._momentum(step), self._momentum(step + 1)
        rounded = slots["mu_product"].detach() * now.float()
        product = rounded.double()
        after = slots | {
            "step": step,
            "mu_product": rounded,
            "exp_avg": torch.lerp(slots["exp_avg"], grad, 1 - self.beta1),
            "exp_avg_sq": mean_square(slots, "exp_avg_sq", grad, self.beta2),
        }
        denominator = root(after["exp_avg_sq"]) / (1 - self.beta2**step).sqrt() + self.eps
        rates = (1 - now) / (1 - product), following / (1 - product * following)
        return after, grad, denominator, rates

    def moved(self, param: Tensor, grad: Tensor, slots: Slots, *, rounded: bool = True) -> Moved:
        """The step."""
        after, grad, denominator, (own, ahead) = self._moments(param, grad, slots)
        kept = apart(param, slots, self.weight_decay) if self.decoupled else param
        return Moved(kept, -slots["lr"] * ((own * grad + ahead * after["exp_avg"]) / denominator), after)

    def remembered(self, param: Tensor, grad: Tensor, slots: Slots) -> tuple[Tensor, float | Tensor]:
        """The memory after the step, and how much of a gradient is ever in it."""
        after, _, _, (own, ahead) = self._moments(param, grad, slots)
        sign = -1.0 if self.maximize else 1.0
        return after["exp_avg"], sign * (own + ahead) / ahead

    def from_memory(self, param: Tensor, grad: Tensor, slots: Slots, memory: Tensor) -> Tensor:
        """The step that this memory makes."""
        _, _, denominator, (_, ahead) = self._moments(param, grad, slots)
        return -slots["lr"] * (ahead * memory / denominator)
