"""Validation losses and their gradients, which samples are measured along."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.compression import compress
from funcghost.algebra.pair_algebra import combine
from funcghost.algebra.pairs import Pairs
from funcghost.algebra.tracking import track
from funcghost.engine.run import run_plain
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses, Problem
from funcghost.transforms.steps import pairs_and_losses
from funcghost.trees import Params, Tree, split_params

Batches = Sequence[Tree]
Sets = Batches | Mapping[str, Batches]
"""The batches of one validation set, or of several by name."""


class Validation(NamedTuple):
    """What is known of the validation sets at some parameters.

    `loss` is the mean loss of the set, or those of k sets, [k]; `gradients` has its gradient for each set, of low rank
    where these are tracked; `along` are the low-rank directions of the last step's values, None where there are none.
    """

    loss: Tensor
    gradients: tuple[Tree, ...]
    along: tuple[Tree, ...] | None = None

    def squeezed(self, validation: Sets) -> "Validation":
        """With one number for the loss where there is one set, and not several by name."""
        return self if isinstance(validation, Mapping) else self._replace(loss=self.loss.reshape(()))


def validation_gradient(losses: Losses, params: Tree, batches: Sequence[Tree]) -> Tree:
    """The gradient of the mean validation loss: `(1/n) sum over all n samples of all batches of grad losses[i]`.

    Batches may differ in size and shape. Cost: a forward and a backward for each.

    Raises:
        InputError: there is no batch, or no sample in them.

    Example:
        >>> import torch
        >>> from funcghost.attribution import in_run
        >>> in_run.validation_gradient(lambda p, x: x @ p["w"], {"w": torch.zeros(2)}, [torch.eye(2)])["w"]
        tensor([0.5000, 0.5000])
    """
    split = split_params(params)
    return split.rebuild(mean_gradient(losses, split, check_batches(batches))[0])


def mean_gradient(losses: Losses, params: Params, batches: Batches) -> tuple[list[Tensor], Tensor]:
    """The gradient of the mean of the losses of all batches, and these losses [n]."""
    if len(batches) == 1:
        outcome = run_plain(Problem(losses, params, batches[0]), "mean")
        some(len(outcome.losses))
        return outcome.gradients, outcome.losses
    total, found = summed_gradient(losses, params, batches)
    return [leaf / some(len(found)) for leaf in total], found


def summed_gradient(losses: Losses, params: Params, batches: Batches) -> tuple[list[Tensor], Tensor]:
    """The gradient of the sum of the losses of all batches, and these losses [n], of which there may be none."""
    total, found = list[Tensor](), list[Tensor]()
    for batch in batches:
        outcome = run_plain(Problem(losses, params, batch), "sum")
        total = [a + b for a, b in zip(total, outcome.gradients, strict=True)] if found else outcome.gradients
        found.append(outcome.losses)
    if not found:
        return [torch.zeros_like(leaf, requires_grad=False) for leaf in params.leaves], params.leaves[0].new_zeros(0)
    return total, torch.cat(found)


def validation_at(losses: Losses, params: Tree, validation: Sets) -> Validation:
    """The validation losses and gradients at these parameters: what `along_path` takes as `before` in a first step.

    Cost and errors: those of `validation_gradient`.

    Example:
        >>> import torch
        >>> from funcghost.attribution import in_run
        >>> in_run.validation_at(lambda p, x: x @ p["w"], {"w": torch.ones(2)}, [torch.eye(2)]).loss
        tensor(1., dtype=torch.float64)
    """
    return Lookout(losses, None, None).at(split_params(params), check_sets(validation), None).squeezed(validation)


def check_batches(batches: Batches, what: str = "validation") -> Batches:
    """A list of batches, and not a batch."""
    if not isinstance(batches, list | tuple) or not batches:
        raise InputError(
            f"{what}: must be a list of one or more batches, found {type(batches).__name__}. Pass [batch]."
        )
    return batches


def some(count: int) -> int:
    """A number of samples to divide by."""
    if count == 0:
        raise InputError("validation: the batches have no samples.")
    return count


def check_sets(validation: Sets) -> list[Batches]:
    """The batches of every set."""
    if not isinstance(validation, Mapping):
        return [check_batches(validation)]
    if not validation:
        raise InputError("validation: there is no set in the mapping.")
    return [check_batches(batches, f"validation[{name!r}]") for name, batches in validation.items()]


def accurate_mean(losses: Tensor) -> Tensor:
    """The mean in float64 where the device has it: differences of it are to have digits."""
    return losses.to(torch.float32 if losses.device.type == "mps" else torch.float64).mean()


class Lookout:
    """Takes losses and gradients of validation sets, whole or of a rank that is followed from point to point."""

    def __init__(self, losses: Losses, rank: int | None, options: Options | None) -> None:
        """Plans are kept as long as this is."""
        self.losses, self.rank = losses, rank
        self._pairs = pairs_and_losses(losses, options=options)

    def at(self, params: Params, sets: Sequence[Batches], previous: Validation | None) -> Validation:
        """At these parameters; `previous` is from near them."""
        found = [self._whole(params, batches) for batches in sets] if self.rank is None else []
        if self.rank is not None:
            old = previous.gradients if previous else [None] * len(sets)
            found = [self._low(params, batches, last) for batches, last in zip(sets, old, strict=True)]
        loss = torch.stack([value for value, _ in found])
        return Validation(loss, tuple(gradient for _, gradient in found), previous.along if previous else None)

    def _whole(self, params: Params, batches: Batches) -> tuple[Tensor, Tree]:
        gradients, losses = mean_gradient(self.losses, params, batches)
        return accurate_mean(losses), params.rebuild(gradients)

    def _low(self, params: Params, batches: Batches, previous: Tree | None) -> tuple[Tensor, Tree]:
        tree = params.rebuild(params.leaves)
        found = [self._pairs(tree, batch) for batch in batches]
        pairs = found[0][0] if len(found) == 1 else Pairs.cat([own for own, _ in found])
        losses = torch.cat([values for _, values in found])
        mean = pairs.weighted(torch.full_like(losses, 1 / some(len(pairs))))
        if previous is not None:
            return accurate_mean(losses), track(mean, previous)
        return accurate_mean(losses), compress(combine(mean, torch.ones_like(losses)), rank=self.rank)
