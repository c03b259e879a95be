"""How to go about it, as far as the caller has a say."""

from dataclasses import dataclass
from typing import Literal

import torch

from funcghost.errors import InputError

RouteName = Literal["ghost", "materialise"]
ROUTES: tuple[RouteName, ...] = ("ghost", "materialise")
Rates = tuple[float, float]
"""FLOP/s of products and bytes/s of memory."""

DEFAULT_BUDGET = 256 * 2**20


@dataclass(frozen=True)
class Options:
    """How to go about it.

    Args:
        verify: when to check the conservation law: on the "first" call (with each new plan, and with sizes that do not
            follow from others), "always" or "never".
        route: "backward" takes scores in the backward wherever a layout fits; "forward" carries every tangent to
            the losses: no backward and no stored activations, for scoring with `fg.reduce`.
        inner_products: the route to inner products of gradients: the "cheapest", or always "ghost" or "materialise"
            where it exists (see `fg.squared_norm`).
        memory_budget: bytes for the tiles of inner products between gradients; 256 MiB by default.
        rates: the machine's FLOP/s of matrix products and bytes/s of memory, by which routes are chosen; measured in
            a few milliseconds when a plan is made, and part of it, if not given.
        compute_dtype: the dtype to which the operands of products for scores are rounded, such as `torch.bfloat16`; by
            default their own (for inner products of gradients float32 at least). Sums are of float32 at least, and
            training gradients are not touched. Ops that are no products, such as norms, keep their precision.

    Raises:
        InputError: an option has a value that is not listed.

    Example:
        >>> import funcghost as fg
        >>> fg.Options(verify="always").route
        'backward'
    """

    verify: Literal["first", "always", "never"] = "first"
    route: Literal["backward", "forward"] = "backward"
    inner_products: Literal["cheapest", "ghost", "materialise"] = "cheapest"
    memory_budget: int = DEFAULT_BUDGET
    rates: Rates | None = None
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        choices = {
            "verify": ("first", "always", "never"),
            "route": ("backward", "forward"),
            "inner_products": ("cheapest", *ROUTES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"Options.{name} must be one of {allowed}, found {getattr(self, name)!r}.")
        if type(self.memory_budget) is not int or self.memory_budget < 1:
            raise InputError(f"Options.memory_budget must be a number of bytes, found {self.memory_budget!r}.")
        pair = isinstance(self.rates, tuple) and len(self.rates) == 2 and all(rate > 0 for rate in self.rates)
        if self.rates is not None and not pair:
            raise InputError(f"Options.rates must be (FLOP/s, bytes/s), two positive numbers, found {self.rates!r}.")
        dtype = self.compute_dtype
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        if dtype is not None and not floating:
            raise InputError(
                f"Options.compute_dtype must be a floating dtype of 16 bits or more, found {dtype!r}. Of numbers of 8 "
                "bits torch has no products on every device: use torch.bfloat16."
            )


def check_options(options: Options | None) -> Options:
    """The options, or those by default."""
    if options is not None and not isinstance(options, Options):
        raise InputError(f"options: must be fg.Options(...), found {type(options).__name__}.")
    return options or Options()
