"""What the routes to inner products of factored gradients cost, and which is the cheapest within a memory budget.

For a and b samples, t and s positions, and a parameter of q blocks of m x n:

    ghost        2 q (a t) (b s) (m + n) FLOPs: products of positions, nothing of the size of the parameter
    materialise  2 (a t + b s) q m n for the gradients themselves, and 2 a b q m n for their products

Long sums are taken in pieces (see `sums.py`): the products of pieces are written and read once more, and a table to
which many rows are added is in float64 for a while.

The norms alone (`diagonal`) need the products of positions of the same sample, a t s, and of no other gradients.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from funcghost.algebra.factors import Factor, Form, Lookup, Outer
from funcghost.algebra.sums import AT_ONCE, in_double, piece
from funcghost.errors import MemoryBudgetError
from funcghost.options import DEFAULT_BUDGET, Options, Rates, RouteName

NOMINAL: Rates = (1e11, 2e10)
"""Where nothing can be measured: their ratio is what matters."""


class Means(NamedTuple):
    """What may be used: bytes of memory for tiles, one route or any, the machine's rates, the dtype to contract in."""

    budget: int = DEFAULT_BUDGET
    route: RouteName | None = None
    rates: Rates = NOMINAL
    dtype: torch.dtype | None = None


ANY = Means()
"""What is used where the caller has no say."""


class Sketch(NamedTuple):
    """The sizes of a factor: `kind`, positions, and the form of the parameter."""

    kind: Literal["outer", "lookup", "dense"]
    positions: int
    form: Form
    itemsize: int = 4


@dataclass(frozen=True)
class Route:
    """A way and its cost: FLOPs of products, bytes moved, and the least and the full memory for its tiles."""

    name: RouteName
    flops: int
    moved: int
    least: int
    full: int

    def seconds(self, rates: Rates) -> float:
        """The time predicted."""
        return self.flops / rates[0] + self.moved / rates[1]


def sketch(factor: Factor) -> Sketch:
    """The sizes of a factor."""
    if isinstance(factor, Outer):
        return Sketch("outer", factor.positions, factor.form, max(4, factor.cols.element_size()))
    if isinstance(factor, Lookup):
        return Sketch("lookup", factor.positions, factor.form, max(4, factor.cols.element_size()))
    return Sketch("dense", 1, factor.form, max(4, factor.value.element_size()))


def bytes_of_entry(use: Sketch) -> int:
    """The memory that an entry of a gradient takes while it is formed."""
    return use.itemsize + 8 if use.kind == "lookup" and in_double(use.positions) and use.itemsize < 8 else use.itemsize


def common_form(uses: Sequence[Sketch]) -> Form | None:
    """The one form in which all uses of a parameter can be had, if there is one."""
    forms = {use.form for use in uses if use.kind == "outer"}
    tables = {use.form for use in uses if use.kind == "lookup"}
    if not forms:
        return next(iter(tables), uses[0].form)
    form = next(iter(forms))
    if len(forms) > 1 or any((*form.blocks, form.shape) != (*table.blocks, table.shape) for table in tables):
        return None
    return form if not tables or _is_matrix(form) else None


def _is_matrix(form: Form) -> bool:
    """Whether the rows are the first axis, and the columns all others in order."""
    return form.plain and form.blocks[0] == 1 and form.blocks[1] == form.shape[0]


def routes(a: Sequence[Sketch], b: Sequence[Sketch], sizes: tuple[int, int], diagonal: bool, same: bool) -> list[Route]:
    """Every route there is for uses of a parameter by a and b samples: `same` if they are of the same samples."""
    form = common_form([*a, *b])
    materialise = _materialise(a, b, sizes, diagonal, same, form)
    if form is None or any(use.kind == "dense" for use in (*a, *b)):
        return [materialise]
    return [_ghost(a, b, sizes, diagonal, form), materialise]


def _ghost(a: Sequence[Sketch], b: Sequence[Sketch], sizes: tuple[int, int], diagonal: bool, form: Form) -> Route:
    q, m, n = form.blocks
    rows, columns = sizes
    flops = moved = least = full = 0
    if diagonal and len(a) == 1 and a[0].kind == "outer" and a[0].positions == q == 1:
        # One position of a sample: its squared sizes, without any product of matrices.
        read = rows * (m + n) * a[0].itemsize
        return Route("ghost", 0, 2 * read, read, read)
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            if diagonal and j < i:
                continue
            tile = 3 * q * other.positions * (1 if diagonal else columns) * max(one.itemsize, other.itemsize)
            pairs = one.positions * other.positions * (rows if diagonal else rows * columns)
            flops += 2 * q * pairs * (m + n if (one.kind, other.kind) == ("outer", "outer") else n)
            moved += 4 * q * pairs * max(one.itemsize, other.itemsize)
            full, least = max(full, tile * one.positions * rows), max(least, tile)
    return Route("ghost", flops, moved, least, full)


def _materialise(
    a: Sequence[Sketch],
    b: Sequence[Sketch],
    sizes: tuple[int, int],
    diagonal: bool,
    same: bool,
    form: Form | None,
) -> Route:
    rows, columns = sizes
    entries, count = prod(a[0].form.blocks), rows if same else rows + columns
    uses = [(use, rows) for use in a] + ([] if same else [(use, columns) for use in b])
    flops = sum(2 * size * use.positions * entries for use, size in uses if use.kind == "outer")
    flops += 0 if diagonal else 2 * rows * columns * entries
    row = entries // max(1, 1 if form is None else form.blocks[1])
    several, size = len(a) > 1 or len(b) > 1, max(bytes_of_entry(use) for use, _ in uses)
    item = size * (2 if several else 1)
    moved = (3 if diagonal else 4) * count * entries * item
    pieces = 0 if diagonal else 4 * rows * columns * -(-entries // piece(rows, columns))
    moved += 2 * pieces
    # Uses are added up one after the other, first those of a.
    held = count if not several else 2 * rows if same else max(2 * rows, rows + 2 * columns)
    kept = min(pieces, 4 * max(AT_ONCE, rows * columns))
    return Route("materialise", flops, moved, (1 if diagonal else count) * row * item, held * entries * size + kept)


def choose(
    a: Sequence[Sketch],
    b: Sequence[Sketch],
    sizes: tuple[int, int],
    means: Means,
    *,
    diagonal: bool = False,
    same: bool = False,
    name: str = "",
) -> tuple[Route, list[Route]]:
    """The cheapest route by predicted time within the budget, and those that were rejected.

    Raises:
        MemoryBudgetError: none has a tile that fits.
    """
    own, other = tuple(a), tuple(b)
    try:
        best, found, wanted = _chosen(own, other, sizes, means, diagonal, same)
    except TypeError:  # sizes are symbols while a compiler traces, which cannot be looked up
        best, found, wanted = _chosen.__wrapped__(own, other, sizes, means, diagonal, same)
    if best is None:
        need = min(route.least for route in wanted)
        raise MemoryBudgetError(
            f"parameter {name!r}: inner products of its gradients need tiles of {need} bytes at least "
            f"({', '.join(f'{route.name} {route.least}' for route in wanted)}), found "
            f"Options.memory_budget={means.budget}. Raise it to {need} or more."
        )
    return best, [route for route in found if route is not best]


@lru_cache(4096)
def _chosen(
    a: tuple[Sketch, ...], b: tuple[Sketch, ...], sizes: tuple[int, int], means: Means, diagonal: bool, same: bool
) -> tuple[Route | None, list[Route], list[Route]]:
    """The cheapest route that fits, all there are, and those wanted."""
    found = routes(a, b, sizes, diagonal, same)
    wanted = [route for route in found if means.route in (None, route.name)] or found
    fitting = [route for route in wanted if route.least <= means.budget]
    return min(fitting, key=lambda route: route.seconds(means.rates), default=None), found, wanted


@cache
def machine_rates(device: torch.device) -> Rates:
    """The rates of a device, measured once per process in a few milliseconds; nominal where there are no values."""
    if device.type == "meta":
        return NOMINAL
    product, memory = torch.ones(384, 384, device=device), torch.ones(2**21, device=device)
    flops = 2 * 384**3 / _fastest(lambda: product @ product, device)
    moved = 2 * memory.numel() * 4 / _fastest(lambda: memory * 2, device)
    return flops, moved


def _fastest(work: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    with torch.no_grad():
        for _ in range(5):
            _wait(device)
            started = time.perf_counter()
            work()
            _wait(device)
            times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def means_of(options: Options, device: torch.device, rates: Rates | None = None) -> Means:
    """What contractions may use: rates as given, those of the plan, or as measured."""
    route = None if options.inner_products == "cheapest" else options.inner_products
    return Means(options.memory_budget, route, options.rates or rates or machine_rates(device), options.compute_dtype)
