"""Hypothesis strategies: pairs of factored gradients, small modules, and batches for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from funcghost.algebra.factors import Dense, Factor, Form, Lookup, Outer, matrix_form
from funcghost.algebra.pairs import Pairs
from funcghost.losses.modules import module_losses
from funcghost.problem import Losses

DIMS = st.integers(1, 3)


def _forms(shape: tuple[int, ...]) -> list[Form]:
    """The ways in which outer products make up a parameter of this shape: rows first, columns first, blocks."""
    if len(shape) < 2:
        return []
    axes = tuple(range(len(shape)))
    found = [matrix_form(shape), Form(shape, shape, ((), axes[1:], axes[:1]))]
    if len(shape) == 3:
        found += [Form(shape, shape, ((0,), (1,), (2,))), Form(shape, shape, ((2,), (0,), (1,)))]
    if shape[0] % 2 == 0:  # groups, as those of a convolution
        found.append(Form(shape, (2, shape[0] // 2, *shape[1:]), ((0,), (1,), tuple(i + 1 for i in axes[1:]))))
    return found


@st.composite
def pairs(
    draw: st.DrawFn,
    samples: int | None = None,
    *,
    integers: bool = False,
    dtype: torch.dtype = torch.float64,
    most_positions: int = 4,
) -> Pairs:
    """Pairs of one to three parameters, each with one to three uses: every kind of factor, and every mix of them.

    With `samples` of so many samples, otherwise none to four. With `integers` of small whole numbers, on which sums and
    products are exact, so that whatever is computed in two ways must be equal to the last bit.

    Example:
        >>> from hypothesis import given
        >>> import funcghost as fg, torch
        >>> from funcghost.testing import pairs
        >>> @given(pairs(integers=True))
        ... def norms_are_the_diagonal(kept):
        ...     assert torch.equal(fg.apply(fg.squared_norm(), kept), fg.apply(fg.gram(), kept).diagonal())
        >>> norms_are_the_diagonal()
    """
    b = draw(st.integers(0, 4)) if samples is None else samples
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    uses: dict[str, tuple[Factor, ...]] = {}
    for name in "uvw"[: draw(DIMS)]:
        shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
        made = [draw(_factors(b, shape, generator, integers, dtype, most_positions)) for _ in range(draw(DIMS))]
        uses[name] = tuple(made)
    parameters = tuple((name, own[0].shape, dtype) for name, own in uses.items())
    nest: Any = dict.fromkeys(uses, 0)
    spec = optree.tree_structure(nest)
    return Pairs(uses, parameters, spec)


@st.composite
def _factors(
    draw: st.DrawFn,
    b: int,
    shape: tuple[int, ...],
    generator: torch.Generator,
    integers: bool,
    dtype: torch.dtype,
    most_positions: int,
) -> Factor:
    def values(*sizes: int) -> Tensor:
        if integers:
            return torch.randint(-3, 4, sizes, generator=generator).to(dtype)
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    forms: list[Form | str] = ["dense", *(["lookup"] if shape else []), *_forms(shape)]
    chosen, t = draw(st.sampled_from(forms)), draw(st.integers(0, most_positions))
    if chosen == "lookup":
        columns = matrix_form(shape).blocks[2]
        return Lookup(torch.randint(0, shape[0], (b, t), generator=generator), values(b, t, columns), shape)
    if isinstance(chosen, Form):
        q, m, n = chosen.blocks
        return Outer(values(b, t, q, m), values(b, t, q, n), chosen)
    return Dense(values(b, *shape))


class _Twice(nn.Module):
    """A layer used two times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())  # type: ignore[no-any-return]


class _Scale(nn.Module):
    """A factor for each feature, and a shift for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift - self.scale * x


class _Merged(nn.Module):
    """A weight with something of low rank added, transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base, self.up = nn.Parameter(torch.zeros(width, width)), nn.Parameter(torch.zeros(width, 1))
        self.down = nn.Parameter(torch.zeros(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base + self.up @ self.down).T


class _Attention(nn.Module):
    """Causal attention with one weight for queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True)


class _Convolution(nn.Module):
    """A convolution over positions, of all channels or of each."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.layer = nn.Conv1d(width, width, 3, padding=2, dilation=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda d: nn.Linear(d, d),
    "without bias": lambda d: nn.Linear(d, d, bias=False),
    "reused": lambda d: _Twice(nn.Linear(d, d)),
    "layer norm": lambda d: nn.LayerNorm(d, eps=0.1),
    "scale": _Scale,
    "merged": _Merged,
    "attention": _Attention,
    "convolution": lambda d: _Convolution(d, 1),
    "channels": lambda d: _Convolution(d, d),
    "weight norm": lambda d: parametrizations.weight_norm(nn.Linear(d, d)),
}


class _Chain(nn.Module):
    """Layers one after another; with a vocabulary over looked-up tokens, and the table as the last layer, too."""

    def __init__(self, layers: Sequence[nn.Module], width: int, vocabulary: int | None) -> None:
        super().__init__()
        self.table = None if vocabulary is None else nn.Embedding(vocabulary, width, padding_idx=0)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.table is None else self.table(x)
        for layer in self.layers:
            h = layer(h)
        return h if self.table is None else F.linear(h, self.table.weight)


@dataclass(frozen=True, eq=False)
class Model:
    """A small module with its losses and parameters; `layers` names what is in it.

    A batch is [b, t, d], or [b, t] of tokens where it has a vocabulary. No sample has an influence on another's loss.
    """

    module: nn.Module
    losses: Losses
    params: dict[str, Tensor]
    layers: tuple[str, ...]
    length: int
    width: int
    vocabulary: int | None

    def batch(self, samples: int, seed: int = 0) -> Tensor:
        """So many samples."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary is not None:
            return torch.randint(0, self.vocabulary, (samples, self.length), generator=generator)
        return torch.randn((samples, self.length, self.width), generator=generator, dtype=torch.float64)


def _losses_of(output: Tensor, _: Any) -> Tensor:
    return output.sin().flatten(1).sum(1)


@st.composite
def models(draw: st.DrawFn, layers: Sequence[str] = tuple(LAYERS)) -> Model:
    """Small modules in float64: one to three layers, over features or over tokens with a tied table.

    Among the layers are linear ones, reused ones, norms, scales, attention, convolutions, merged and normed weights.

    Example:
        >>> from hypothesis import given, settings
        >>> from funcghost.testing import assert_matches_naive, models
        >>> @settings(max_examples=5, deadline=None)
        ... @given(models())
        ... def matches(model):
        ...     assert_matches_naive(model.losses, model.params, model.batch(3))
        >>> matches()
    """
    width, length = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    vocabulary = draw(st.none() | st.integers(2, 5))
    names = tuple(draw(st.lists(st.sampled_from(list(layers)), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    state = torch.get_rng_state()
    module = _Chain([LAYERS[name](width) for name in names], width, vocabulary).double()
    torch.set_rng_state(state)
    params: dict[str, Tensor] = dict(module.named_parameters())
    with torch.no_grad():
        for value in params.values():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.7)
    return Model(module, module_losses(module, _losses_of), params, names, length, width, vocabulary)


def batches(model: Model, smallest: int = 1, largest: int = 4) -> st.SearchStrategy[Tensor]:
    """Batches for a model.

    Example:
        >>> from hypothesis import given, settings, strategies as st
        >>> from funcghost.testing import batches, models
        >>> @settings(max_examples=5, deadline=None)
        ... @given(st.data())
        ... def one_loss_for_each_sample(data):
        ...     model = data.draw(models())
        ...     batch = data.draw(batches(model))
        ...     assert model.losses(model.params, batch).shape == batch.shape[:1]
        >>> one_loss_for_each_sample()
    """
    return st.builds(model.batch, st.integers(smallest, largest), st.integers(0, 2**16))
