"""Pairs: the per-sample gradients of a batch in factored form, kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funcghost.algebra.contractions import summed
from funcghost.algebra.directions import Leaf, LowRank
from funcghost.algebra.factors import Dense, Factor, Lookup, Outer, nbytes, samples
from funcghost.dtypes import as_written
from funcghost.errors import InputError
from funcghost.trees import Params, Tree


@dataclass(frozen=True, eq=False)
class Pairs:
    """The per-sample gradients of b samples: for each parameter the factors of all of its uses.

    `uses` maps names to factors, `parameters` lists names, shapes and dtypes, `spec` is the structure of the tree.

    Law: `fg.materialize(pairs)` is the tree of per-sample gradients [b, *shape]; whatever else is made of pairs is that
    of these gradients.

    `pairs[i]`, `pairs[2:5]` and `pairs[index]` choose samples, `Pairs.cat([p, q])` puts batches together, `len(pairs)`
    is b, `pairs.to(device or dtype)` moves or casts. A pytree for optree and for torch.

    Example:
        >>> import funcghost as fg, torch
        >>> pairs = fg.pairs(lambda params, x: (x @ params["w"]).sum(1))({"w": torch.zeros(2, 3)}, torch.eye(2))
        >>> pairs
        Pairs of 2 samples, 40 bytes
          w  2x3  outer, 1 position
        >>> len(pairs[:1])
        1
    """

    uses: Mapping[str, tuple[Factor, ...]]
    parameters: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    spec: optree.PyTreeSpec

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return next(iter(self.uses.values()))[0].tensors[0].device

    @property
    def params(self) -> Params:
        """The parameters without values."""
        device = self.device
        leaves = (torch.empty((), dtype=dtype, device=device).expand(shape) for _, shape, dtype in self.parameters)
        return Params(tuple(self.uses), tuple(leaves), self.spec)

    def __len__(self) -> int:
        return samples(next(iter(self.uses.values()))[0])

    def __getitem__(self, index: Any) -> "Pairs":
        """The pairs of some samples."""
        if type(index) is int:
            if not -len(self) <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        return self.map(lambda value: value[index])

    def map(self, function: Any) -> "Pairs":
        """With another tensor for each of its own."""
        uses = {name: tuple(use.map(function) for use in uses) for name, uses in self.uses.items()}
        return Pairs(uses, self.parameters, self.spec)

    def to(self, target: torch.device | str | torch.dtype) -> "Pairs":
        """On another device, or in another floating dtype."""
        cast = isinstance(target, torch.dtype)
        return self.map(lambda value: value if cast and not value.is_floating_point() else value.to(target))

    def weighted(self, weights: Tensor) -> "Pairs":
        """The gradients times a weight for each sample, [b]: those of the losses times the weights.

        Raises:
            InputError: the weights are not [b].
        """
        check_weights("weighted", self, weights)

        def scaled(use: Factor) -> Factor:
            *others, last = use.tensors
            given = iter((*others, last * weights.to(last.dtype).view(-1, *[1] * (last.dim() - 1))))
            return use.map(lambda _: next(given))

        uses = {name: tuple(map(scaled, uses)) for name, uses in self.uses.items()}
        return Pairs(uses, self.parameters, self.spec)

    def as_direction(self) -> Tree:
        """The sum of the gradients, as a direction: with low-rank leaves, one rank for each position, where cheaper.

        Law: `fg.dot(pairs) == fg.dot(fg.combine(pairs, ones))`.
        """
        with as_written(self.device):
            leaves = [_summed(self.uses[name], dtype) for name, _, dtype in self.parameters]
        return optree.tree_unflatten(self.spec, leaves)

    @staticmethod
    def cat(parts: Sequence["Pairs"]) -> "Pairs":
        """The samples of all parts; positions may differ in number, where a use has fewer there are zeros.

        Raises:
            InputError: the parts are not of the same parameters, used in the same ways.
        """
        if not parts or not all(isinstance(part, Pairs) for part in parts):
            raise InputError("Pairs.cat: takes one or more Pairs.")
        first = parts[0]
        for number, part in enumerate(parts[1:], 1):
            if _kinds(part) != _kinds(first):
                raise InputError(f"Pairs.cat: part {number} is not of the same uses of the same parameters as part 0.")
        columns = {name: zip(*(part.uses[name] for part in parts), strict=True) for name in first.uses}
        joined = {name: tuple(map(_joined, uses)) for name, uses in columns.items()}
        return Pairs(joined, first.parameters, first.spec)

    @property
    def nbytes(self) -> int:
        """The memory of all factors."""
        return sum(nbytes(use) for uses in self.uses.values() for use in uses)

    def __repr__(self) -> str:
        rows = []
        for name, uses in self.uses.items():
            shape = "x".join(map(str, uses[0].shape)) or "scalar"
            rows.append((name, shape, "; ".join(map(_words, uses))))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {what}" for name, shape, what in rows]
        return "\n".join([f"Pairs of {len(self)} samples, {self.nbytes} bytes", *lines])


def _summed(uses: Sequence[Factor], dtype: torch.dtype) -> Leaf:
    """The sum over the samples of the gradients of one parameter."""
    first = uses[0]
    if first.form.plain and all(isinstance(use, Outer) and use.form == first.form for use in uses):
        _, m, n = first.form.blocks
        rank = sum(samples(use) * use.positions for use in uses if isinstance(use, Outer))
        if rank * (m + n) < m * n:
            rows, cols = (
                torch.cat([use.tensors[i].flatten(0, 1).permute(1, 2, 0) for use in uses], 2).to(dtype) for i in (0, 1)
            )
            return LowRank(rows, cols, first.shape, rows.new_zeros((), dtype=torch.promote_types(dtype, torch.float32)))
    return summed(uses).to(dtype)


def _words(use: Factor) -> str:
    if isinstance(use, Dense):
        return "dense"
    kind = "outer" if isinstance(use, Outer) else "lookup"
    return f"{kind}, {use.positions} position{'' if use.positions == 1 else 's'}"


def _kinds(pairs: Pairs) -> dict[str, list[Any]]:
    return {name: [(type(use), use.form) for use in uses] for name, uses in pairs.uses.items()}


def _joined(uses: Sequence[Any]) -> Any:
    """One factor of the samples of several, padded with zeros to the longest."""
    if isinstance(uses[0], Dense):
        return Dense(torch.cat([use.value for use in uses]))
    longest = max(use.positions for use in uses)

    def padded(value: Tensor) -> Tensor:
        missing = longest - value.shape[1]
        return torch.cat([value, value.new_zeros((len(value), missing, *value.shape[2:]))], 1) if missing else value

    columns = zip(*(use.map(padded).tensors for use in uses), strict=True)
    tensors = iter([torch.cat(column) for column in columns])
    return uses[0].map(lambda _: next(tensors))


def check_weights(what: str, pairs: Pairs, weights: Any) -> None:
    """Weights must be floating numbers, one per sample, or a mask of them."""
    numbers = isinstance(weights, Tensor) and (weights.is_floating_point() or weights.dtype is torch.bool)
    if not isinstance(weights, Tensor) or weights.shape != (len(pairs),) or not numbers:
        found = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise InputError(
            f"{what}: weights must be floating numbers [{len(pairs)}], one per sample, or a mask, found {found}."
        )


def _flatten(pairs: Pairs) -> tuple[list[Tensor], Any]:
    found = [value for uses in pairs.uses.values() for use in uses for value in use.tensors]
    kinds = tuple((name, tuple(map(_kind, uses))) for name, uses in pairs.uses.items())
    return found, (kinds, pairs.parameters, pairs.spec)


def _kind(use: Factor) -> tuple[Any, ...]:
    """The type of a factor, how many tensors it has, and what else it is made of."""
    facts = (use.form,) if isinstance(use, Outer) else (use.shape,) if isinstance(use, Lookup) else ()
    return type(use), len(use.tensors), facts


def _unflatten(context: Any, tensors: Sequence[Any]) -> Pairs:
    kinds, parameters, spec = context
    given = iter(tensors)
    uses = {
        name: tuple(kind(*(next(given) for _ in range(count)), *facts) for kind, count, facts in own)
        for name, own in kinds
    }
    return Pairs(uses, parameters, spec)


_registry: Any = optree  # typed for collections
_registry.register_pytree_node(Pairs, _flatten, _unflatten, namespace=optree.registry.__GLOBAL_NAMESPACE)
torch.utils._pytree.register_pytree_node(
    Pairs, _flatten, lambda tensors, context: _unflatten(context, list(tensors)), serialized_type_name="funcghost.Pairs"
)
