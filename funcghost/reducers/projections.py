"""Random projections of per-sample gradients, from signs that are computed where they are needed and never stored.

The random numbers are a function of (seed, name of the parameter, place): the same on every device, in every process
and for every split of the batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from funcghost.algebra.contractions import in_dtype
from funcghost.algebra.cost import ANY, Means
from funcghost.algebra.factors import Dense, Factor, Form, Lookup, Outer, blocks, dense, matrix_form, samples
from funcghost.algebra.sums import product, total
from funcghost.dtypes import wide
from funcghost.errors import InputError
from funcghost.reducers.bases import Additive, register

Kind = Literal["rademacher", "gaussian", "kronecker", "sjlt", "mask"]
KINDS = ("rademacher", "gaussian", "kronecker", "sjlt", "mask")

# Multipliers of the splitmix64 and of a Weyl sequence, as signed 64 bit numbers: products wrap around.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mix(value: Tensor) -> Tensor:
    """A bijection of 64 bit numbers whose outputs look independent (the finaliser of splitmix64)."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * _FIRST
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


def _bits(seed: int, places: Tensor, columns: Tensor) -> Tensor:
    """64 random bits for each place and column."""
    return _mix(_mix(places.unsqueeze(-1) * _STEP + seed) + columns * _STEP)


def seed_of(seed: int, name: str) -> int:
    """64 bits for a parameter, that have nothing to do with those of another name or another seed."""
    return int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little", signed=True)


def numbers(kind: str, seed: int, places: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Independent random numbers of mean 0 and variance 1 for each place [..] and each of `dim` columns, [.., dim]."""
    columns = torch.arange(dim, device=places.device)
    if kind == "gaussian":
        bits = _bits(seed, places, columns)
        # Two uniform numbers of 32 bits each, by Box and Muller.
        radius = (((bits >> 32) & 0xFFFFFFFF).to(torch.float64) + 0.5) / 2**32
        angle = (bits & 0xFFFFFFFF).to(torch.float64) * (2 * torch.pi / 2**32)
        return ((-2 * radius.log()).sqrt() * angle.cos()).to(dtype)
    words = _bits(seed, places, columns[: -(-dim // 32)])  # 32 signs from each word
    # Eight signs for each of the lower four bytes, looked up: one pass, and nothing wider than the signs.
    lower = words.unsqueeze(-1).view(torch.uint8)[..., :4].int()
    byte, shifts = torch.arange(256, device=places.device), torch.arange(8, device=places.device)
    signs = 2 * ((byte.unsqueeze(1) >> shifts) & 1) - 1
    found: Tensor = torch.nn.functional.embedding(lower, signs.to(dtype)).flatten(-3)
    return found[..., :dim]


def places_and_signs(seed: int, places: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each place one of `count` numbers, as likely as another to 1 part in 2^31, and a sign; both like `places`."""
    bits = _bits(seed, places, places.new_zeros(1)).squeeze(-1)
    return ((bits >> 1) & 0x7FFFFFFFFFFFFFFF) % count, (2 * (bits & 1) - 1).to(dtype)


@dataclass(frozen=True, eq=False)
class Project(Additive):
    """See `project`."""

    dim: int
    seed: int
    kind: Kind
    means: Means = field(default=ANY, repr=False)
    degree: ClassVar[int] = 1

    def within(self, means: Means) -> Self:
        """The same projection, in slices that fit the budget."""
        return replace(self, means=means)

    def of_parameter(self, name: str, uses: Sequence[Factor]) -> Tensor:
        """[b, dim]."""
        first, *others = (self._of_use(seed_of(self.seed, name), use) for use in uses)
        for other in others:
            first = first + other
        return first

    def zero(self, batch: int, like: Tensor) -> Tensor:
        """[b, dim]."""
        return like.new_zeros((batch, self.dim))

    def _of_use(self, seed: int, use: Factor) -> Tensor:
        use = use.map(in_dtype(self.means.dtype))
        form = matrix_form(use.shape) if use.shape else use.form
        two_sided = self.kind == "kronecker" and form.blocks[2] > 1
        if self.kind == "sjlt" or (self.kind == "kronecker" and not two_sided):
            return self._hashed(seed, use, form, self.means.budget)
        if self.kind == "mask":
            return self._masked(seed, use, form, self.means.budget) * math.sqrt(math.prod(form.blocks) / self.dim)
        found = self._two_sided(seed, use, form) if two_sided else self._entrywise(seed, use, form, self.means.budget)
        return found / math.sqrt(self.dim)

    def _hashed(self, seed: int, use: Factor, form: Form, budget: int) -> Tensor:
        """Every entry, with a sign, added to one of the columns."""
        own = use if isinstance(use, Lookup) or use.form == form else Dense(dense(use))
        _, m, n = form.blocks
        b = samples(use)
        width = max(1, budget // max(1, 16 * n * (2 * b + 2)))
        total = wide(use.tensors[-1]).new_zeros((self.dim, b))
        for at in range(0, m, width):
            stop = min(at + width, m)
            part = blocks(own, form, at, stop).reshape(b, (stop - at) * n)
            columns, signs = places_and_signs(
                seed, torch.arange(at * n, stop * n, device=part.device), self.dim, part.dtype
            )
            total = total.index_add(0, columns, (part * signs).T.contiguous())
        return total.T.contiguous()

    def _masked(self, seed: int, use: Factor, form: Form, budget: int) -> Tensor:
        """Entries drawn with replacement, one for each column, each with a sign: the others are never computed."""
        _, m, n = form.blocks
        b, like = samples(use), wide(use.tensors[-1])
        columns = torch.arange(self.dim, device=like.device)
        if not m * n:
            return like.new_zeros((b, self.dim))
        entries, signs = places_and_signs(seed, columns, m * n, like.dtype)
        rows, cols = entries // n, entries % n
        if isinstance(use, Lookup):
            found = torch.cat(
                [
                    ((use.index.unsqueeze(2) == rows[at]) * wide(use.cols)[..., cols[at]]).sum(1)
                    for at in self._slices(b * use.index.shape[1], budget)
                ],
                1,
            )
        elif isinstance(use, Outer) and use.form == form:
            left, right = wide(use.rows).squeeze(2), wide(use.cols).squeeze(2)
            found = torch.cat(
                [(left[..., rows[at]] * right[..., cols[at]]).sum(1) for at in self._slices(b * left.shape[1], budget)],
                1,
            )
        else:
            found = form.fold(dense(use)).reshape(b, m * n)[:, entries]
        return found * signs

    def _slices(self, positions: int, budget: int) -> list[slice]:
        width = max(1, budget // max(1, 32 * positions))
        return [slice(at, min(at + width, self.dim)) for at in range(0, self.dim, width)]

    def _entrywise(self, seed: int, use: Factor, form: Form, budget: int) -> Tensor:
        """With a number for each entry and column, in slices of rows of the parameter."""
        own = use if isinstance(use, Lookup) or use.form == form else Dense(dense(use))
        _, m, n = form.blocks
        b, kind = samples(use), "gaussian" if self.kind == "gaussian" else "rademacher"
        width = max(1, budget // max(1, 16 * n * (self.dim + b)))

        def terms() -> Iterator[Tensor]:
            yield wide(use.tensors[-1]).new_zeros((b, self.dim))
            for at in range(0, m, width):
                stop = min(at + width, m)
                part = blocks(own, form, at, stop).reshape(b, (stop - at) * n)
                places = torch.arange(at * n, stop * n, device=part.device)
                yield product(part, numbers(kind, seed, places, self.dim, part.dtype))

        return total(terms())

    def _two_sided(self, seed: int, use: Factor, form: Form) -> Tensor:
        """With `P (x) Q`, rows and columns each projected on their own: nothing of the size of the parameter."""
        left = next(k for k in range(math.isqrt(self.dim), 0, -1) if self.dim % k == 0)
        right = self.dim // left
        _, m, n = form.blocks

        def signs(count: int, dim: int, side: int, like: Tensor) -> Tensor:
            places = torch.arange(count, device=like.device)
            return numbers("rademacher", seed_of(seed, f"{side}"), places, dim, like.dtype)

        if isinstance(use, Lookup):
            cols = wide(use.cols)
            rows = numbers("rademacher", seed_of(seed, "0"), use.index, left, cols.dtype)
            return _outer(rows, product(cols, signs(n, right, 1, cols)))
        if isinstance(use, Outer) and use.form == form:
            rows, cols = wide(use.rows).squeeze(2), wide(use.cols).squeeze(2)
            return _outer(product(rows, signs(m, left, 0, rows)), product(cols, signs(n, right, 1, cols)))
        value = form.fold(dense(use)).squeeze(1)  # [b, m, n]
        return product(product(signs(m, left, 0, value).T, value), signs(n, right, 1, value)).flatten(1)


def _outer(rows: Tensor, cols: Tensor) -> Tensor:
    """The sum over positions of outer products, [b, left * right]."""
    return product(rows.mT, cols).flatten(1)


def project(dim: int, seed: int = 0, kind: Kind = "rademacher") -> Project:
    """A random projection of every per-sample gradient: `out[i] = R grad losses[i]`, with `E[R^T R] = 1`.

    Inner products are kept in expectation, `E <out[i], out[j]> = <grad_i, grad_j>`. With independent entries
    ("rademacher": signs; "gaussian") the variance is at most `2 |grad_i|^2 |grad_j|^2 / dim`, so by Johnson and
    Lindenstrauss `dim >= 8 log(b / delta) / eps^2` keeps all distances of b gradients to a factor `1 +- eps` with
    probability `1 - delta`. "kronecker" projects rows and columns of each weight on their own, `R = P (x) Q`: exact in
    expectation, with up to three times the standard deviation, and by far the cheapest of these. Two kinds are sparse:
    "sjlt" adds every entry, with a sign, to one of the columns: the variance of independent signs, for one addition an
    entry in place of `dim`. "mask" takes one drawn entry for each column, with a sign and the factor `sqrt(m n / dim)`:
    exact in expectation, the cheapest where positions are few, and good only where gradients are spread evenly over
    their entries, as its variance is that of a sample: `m n sum(g^2 h^2) / dim`.

    Shapes: [b, dim]. Matrices of convolutions and of blocks are those with the first axis as rows; biases and other
    vectors have one side, and are projected entry by entry ("kronecker": as with "sjlt"). `dim` is left x right for
    "kronecker", as near to square as it divides.

    R is a function of (seed, name and shape of the parameter) alone: the same in every process, on every device and for
    every split of the batch, so that gradients projected apart can be compared. It is computed when it is needed and
    never stored.

    Cost: per use of `m x n` with t positions: `2 b t m n + 2 b m n dim`, and `m n dim` random signs; "kronecker" has
    `2 b t (m left + n right + dim)`.

    Raises:
        InputError: dim is not 1 or more, the seed no integer, the kind none of these.

    Example:
        >>> import funcghost as fg, torch
        >>> score = fg.reduce(lambda params, x: x @ params["w"])
        >>> score({"w": torch.zeros(2)}, torch.eye(2), fg.project(dim=4)).square().sum(1)
        tensor([1., 1.])

    Source: Johnson, Lindenstrauss (1984); Achlioptas, "Database-friendly random projections" (2003) for signs; Park et
    al., "TRAK" (arXiv 2303.14186), for gradients; Choe et al., "What is Your Data Worth to GPT?" (arXiv 2405.13954),
    section 3, for the two-sided form; Charikar, Chen, Farach-Colton (2002), and Kane, Nelson, "Sparser
    Johnson-Lindenstrauss Transforms" (arXiv 1012.1577), with one entry for each column of R, for "sjlt"; Hu et al.,
    "GraSS" (arXiv 2505.18976), for sparse projections and masks of gradients.
    """
    if type(dim) is not int or dim < 1:
        raise InputError(f"project: dim must be a number of dimensions, 1 or more, found {dim!r}.")
    if type(seed) is not int:
        raise InputError(f"project: seed must be an integer, found {seed!r}.")
    if kind not in KINDS:
        raise InputError(f"project: kind must be one of {KINDS}, found {kind!r}.")
    return Project(dim, seed, kind)


register(Project, (), ("dim", "seed", "kind"))
