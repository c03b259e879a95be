"""Every rule against the op's own backward, and every broken rule against the conservation law.

The numbers are small integers (or powers of two where something is divided by them), so that different routes to the
same linear map agree to the last bit; only normalisations need a tolerance.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcghost as fg
from funcghost.losses.examples import gathered
from funcghost.ops import rules
from funcghost.ops.digest import op_name
from funcghost.ops.rules import Rule, register_rule, registered
from funcghost.ops.tangent import Call, Outputs, Way, covered_by_rule, flatten_call, is_float, outputs, pushforward
from tests.naive import assert_scores, expected

T: Any = torch.Tensor
Params = dict[str, Tensor]


def ints(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 17 * sum(shape))
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def halves(*shape: int, seed: int = 0) -> Tensor:
    """Powers of two of either sign: dividing by them is exact."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return sign * torch.exp2(torch.randint(-2, 3, shape, generator=generator).double())


@dataclass(frozen=True, eq=False)
class Sample:
    """A call of an op.

    `beyond`: the slots of floating tensors in which the rule does not say that the op is linear. `ways`: what the op
    itself offers besides the rule ("forward" is left out where it is another map than the backward's transpose,
    "transpose" where the backward cannot be differentiated). `exact`: whether integers give exact results.
    """

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    beyond: tuple[int, ...] = ()
    ways: tuple[Way, ...] = ("forward", "transpose")
    exact: bool = True

    @property
    def leaves(self) -> tuple[Any, ...]:
        return tuple(flatten_call(self.args, self.kwargs)[0])

    @property
    def floats(self) -> list[int]:
        return [slot for slot, leaf in enumerate(self.leaves) if is_float(leaf)]

    def call(self, tracked: tuple[int, ...]) -> Call:
        return Call(self.op, self.leaves, flatten_call(self.args, self.kwargs)[1], tracked)

    def sets(self) -> Iterator[tuple[int, ...]]:
        """Every set of arguments that may carry a tangent."""
        for size in range(1, len(self.floats) + 1):
            yield from itertools.combinations(self.floats, size)

    def covered(self) -> list[tuple[int, ...]]:
        return [slots for slots in self.sets() if not set(slots) & set(self.beyond)]

    def run(self, tangible: dict[int, Tensor]) -> Outputs:
        leaves = [tangible.get(slot, leaf) for slot, leaf in enumerate(self.leaves)]
        args, kwargs = optree.tree_unflatten(flatten_call(self.args, self.kwargs)[1], leaves)
        return outputs(self.op(*args, **kwargs), ())


A, B, C = ints(3, 4), ints(4, 2, seed=1), ints(3, 4, seed=2)
V4, W4 = ints(4, seed=3), ints(4, seed=4)
BA, BB = ints(2, 3, 4, seed=5), ints(2, 4, 2, seed=6)
INDEX = torch.tensor([[0, 2, 2], [4, 2, 0]])
BAGS = torch.tensor([[0, 2, 2, 1], [4, 2, 0, 1]])
ROWS = ints(5, 2, seed=7)
OFFSETS = torch.tensor([0, 2, 4, 4])
F32A, F32B = ints(8, 16, dtype=torch.float32), ints(2, 16, 8, seed=1, dtype=torch.float32)
GROUPS = torch.tensor([4, 8], dtype=torch.int32)


def products() -> Iterator[Sample]:
    for op in (torch.mm, T.mm, torch.matmul, T.matmul):
        yield Sample(op_name(op), op, (A, B))
    yield Sample("__rmatmul__", T.__rmatmul__, (B, A))
    for op in (torch.bmm, T.bmm):
        yield Sample(op_name(op), op, (BA, BB))
    for op in (torch.mv, T.mv):
        yield Sample(op_name(op), op, (A, V4))
    yield Sample("dot", torch.dot, (V4, W4))
    yield Sample("outer", torch.outer, (V4, W4))
    yield Sample("matmul: vector matrix", torch.matmul, (V4, B))
    yield Sample("matmul: broadcast batch", torch.matmul, (BA, B))
    yield Sample("matmul: vector vector", T.matmul, (V4, W4))
    yield Sample("einsum", torch.einsum, ("ij,jk->ki", A, B))
    yield Sample("einsum: implicit", torch.einsum, ("bij,bjk", BA, BB))
    yield Sample("einsum: three", torch.einsum, ("ij,jk,il->kl", A, B, C))
    yield Sample("einsum: ellipsis", torch.einsum, ("...j,jk->...k", BA, B))
    yield Sample("einsum: sublists", torch.einsum, (A, [0, 1], B, [1, 2], [2, 0]))
    yield Sample("einsum: list", torch.einsum, ("ij,jk->ik", [A, B]))
    yield Sample("einsum: one", torch.einsum, ("ij->j", A))
    for op in (torch.mul, T.mul):
        yield Sample(op_name(op), op, (A, C))
        yield Sample(op_name(op) + ": broadcast", op, (A, V4))
        yield Sample(op_name(op) + ": scalar", op, (A, 3.0))
    yield Sample("mul: integer tensor", torch.mul, (A, torch.arange(4)))
    yield Sample("mul: zero-dimensional", torch.mul, (A, torch.tensor(2.0, dtype=torch.float64)))
    yield Sample("mul: complex", torch.mul, (A, torch.complex(C, A)))
    yield Sample("mul: both complex", torch.mul, (torch.complex(A, C), torch.complex(C, -A)))
    yield Sample("mul: squared", torch.mul, (A, A))
    yield Sample("mul: keywords", torch.mul, (), {"input": A, "other": C})
    yield Sample("mul: mixed dtypes", torch.mul, (A, ints(4, dtype=torch.float32)))


def sums_and_views() -> Iterator[Sample]:
    X = ints(2, 4, 2, seed=8)
    yield Sample("cat", torch.cat, ([A, C, ints(1, 4)],))
    yield Sample("cat: axis", torch.cat, ((A, C),), {"dim": -1})
    # Integers beside the tangent would have to be zero: no rule.
    yield Sample("cat: integer tensor", torch.cat, ([A, torch.arange(4)[None]],), beyond=(0,))
    yield Sample("stack: integer tensor", torch.stack, ([V4, torch.arange(4)],), beyond=(0,))
    yield Sample("cat: mixed dtypes", torch.cat, ([A, ints(1, 4, dtype=torch.float32)],))
    yield Sample("cat: empty", torch.cat, ([A, A.new_empty(0)],))
    yield Sample("stack", torch.stack, ([A, C],), {"dim": 1})
    for op in (torch.clone, T.clone, torch.neg, T.neg, torch.t, T.t, T.T.__get__):
        yield Sample(op_name(op), op, (A,))
    yield Sample("contiguous", T.contiguous, (A.t(),))
    yield Sample("to: dtype", T.to, (A, torch.float32))
    yield Sample("to: device and dtype", T.to, (A, "cpu", torch.float32), {"copy": True})
    yield Sample("to: other", T.to, (A, ints(2, dtype=torch.float32)))
    yield Sample("float", T.float, (A,))
    yield Sample("double", T.double, (A.float(),))
    yield Sample("bfloat16", T.bfloat16, (A,))
    yield Sample("type_as", T.type_as, (A, ints(2, dtype=torch.float32)))
    for op in (torch.sum, T.sum, torch.mean, T.mean):
        yield Sample(op_name(op), op, (X,))
        yield Sample(op_name(op) + ": axis", op, (X, 1))
        yield Sample(op_name(op) + ": axes, keepdim", op, (X,), {"dim": (0, -2), "keepdim": True})
        yield Sample(op_name(op) + ": dtype", op, (X.float(), 1), {"dtype": torch.float64})
    yield Sample("__neg__", T.__neg__, (A,))
    yield Sample("mT", T.mT.__get__, (BA,))
    for op in (torch.transpose, T.transpose):
        yield Sample(op_name(op), op, (BA, 0, -1))
    for op in (torch.permute, T.permute):
        yield Sample(op_name(op), op, (BA, (2, 0, 1)))
    yield Sample("permute: bare", T.permute, (BA, 2, 0, 1))
    yield Sample("movedim", T.movedim, (BA, 0, -1))
    yield Sample("view", T.view, (A, 2, 6))
    yield Sample("view: -1", T.view, (A, (-1,)))
    for op in (torch.reshape, T.reshape):
        yield Sample(op_name(op), op, (A.t(), (2, -1)))
    for op in (torch.flatten, T.flatten):
        yield Sample(op_name(op), op, (BA, 1))
    yield Sample("unflatten", T.unflatten, (A, 1, (2, 2)))
    yield Sample("expand", T.expand, (V4, 3, -1))
    yield Sample("expand_as", T.expand_as, (V4, A))
    yield Sample("repeat", T.repeat, (A, 2, 1, 3))
    for op in (torch.squeeze, T.squeeze):
        yield Sample(op_name(op), op, (ints(1, 3, 1),))
        yield Sample(op_name(op) + ": axis", op, (ints(1, 3, 1), 0))
    for op in (torch.unsqueeze, T.unsqueeze):
        yield Sample(op_name(op), op, (A, 1))
    yield Sample("getitem: integer", T.__getitem__, (A, 1))
    yield Sample("getitem: slices", T.__getitem__, (A, (slice(None, None, 2), None, slice(1, 3))))
    yield Sample("getitem: index twice", T.__getitem__, (A, torch.tensor([0, 2, 2, 0])))
    yield Sample("getitem: indices", T.__getitem__, (BA, (slice(None), torch.tensor([[0, 2]]), torch.tensor([1]))))
    yield Sample("getitem: mask", T.__getitem__, (A, C > 0))
    yield Sample("getitem: ellipsis", T.__getitem__, (BA, (Ellipsis, 0)))
    yield Sample("narrow", T.narrow, (A, 1, 1, 2))
    yield Sample("index_select", T.index_select, (A, 0, torch.tensor([2, 2, 0])))
    yield Sample("select", T.select, (A, 1, -1))
    for op in (torch.chunk, T.chunk):
        yield Sample(op_name(op), op, (ints(5, 2), 2))
    for op in (torch.split, T.split):
        yield Sample(op_name(op), op, (ints(5, 2), [2, 3]))
        yield Sample(op_name(op) + ": size, axis", op, (A, 3, 1))
    for op in (torch.unbind, T.unbind):
        yield Sample(op_name(op), op, (A, 1))


def additions() -> Iterator[Sample]:
    for op in (torch.add, T.add, torch.sub, T.sub, T.__rsub__):
        yield Sample(op_name(op), op, (A, C))
        yield Sample(op_name(op) + ": broadcast", op, (V4, A))
        yield Sample(op_name(op) + ": scalar", op, (A, 2.5))
    for op in (torch.add, T.add, torch.sub, T.sub):
        yield Sample(op_name(op) + ": alpha", op, (A, C), {"alpha": 3})
        yield Sample(op_name(op) + ": alpha, scalar", op, (A, 2), {"alpha": 3})
    yield Sample("add: keywords", torch.add, (A,), {"other": C, "alpha": -2})
    yield Sample("add: integer tensor", torch.add, (A, torch.arange(4)))
    yield Sample("add: scalar first", torch.add, (2.0, A))
    for op in (torch.div, T.div):
        yield Sample(op_name(op), op, (A, halves(4)), beyond=(1,))
        yield Sample(op_name(op) + ": scalar", op, (A, 4))
    for op in (torch.div, T.div):
        yield Sample(op_name(op) + ": no rounding", op, (A, 4), {"rounding_mode": None})
        # Rounded, it is no longer linear, and its gradient is zero.
        for mode in ("floor", "trunc"):
            yield Sample(op_name(op) + ": " + mode, op, (A, halves(4)), {"rounding_mode": mode}, beyond=(0, 1))


def weighted() -> Iterator[Sample]:
    x, w, b = ints(2, 3, 4), ints(5, 4, seed=1), ints(5, seed=2)
    yield Sample("linear", F.linear, (x, w, b))
    yield Sample("linear: keywords", F.linear, (x, w), {"bias": b})
    yield Sample("linear: no bias", F.linear, (x, w))
    yield Sample("linear: bias None", F.linear, (x, w, None))
    yield Sample("linear: one row", F.linear, (V4, w, b))
    yield Sample("linear: all keywords", F.linear, (), {"input": x, "weight": w, "bias": b})
    for op in (torch.addmm, T.addmm):
        yield Sample(op_name(op), op, (ints(2), A, B))
        yield Sample(op_name(op) + ": alpha, beta", op, (ints(3, 2), A, B), {"alpha": 3, "beta": -2})
        yield Sample(op_name(op) + ": beta 0", op, (ints(3, 2), A, B), {"beta": 0})
    for op in (torch.baddbmm, T.baddbmm):
        yield Sample(op_name(op), op, (ints(2), BA, BB))
        yield Sample(op_name(op) + ": alpha, beta", op, (ints(2, 3, 2), BA, BB), {"alpha": 2, "beta": 4})
    for op in (F.grouped_mm, torch._grouped_mm):
        # There is no float64 kernel, and no forward derivative.
        twice: tuple[Way, ...] = ("transpose",)
        yield Sample(op_name(op), op, (F32A, F32B), {"offs": GROUPS}, ways=twice)
        yield Sample(op_name(op) + ": batched", op, (F32A.expand(2, 8, 16).contiguous(), F32B), ways=twice)


def convolutions() -> Iterator[Sample]:
    pairs = ((F.conv1d, F.conv_transpose1d), (F.conv2d, F.conv_transpose2d), (F.conv3d, F.conv_transpose3d))
    for n, (conv, transposed) in enumerate(pairs, 1):
        x, b = ints(2, 4, *(5,) * n), ints(4, seed=1)
        w = ints(4, 4, *(3,) * n, seed=2)
        depthwise = ints(4, 1, *(3,) * n, seed=3)
        name = op_name(conv)
        yield Sample(name, conv, (x, w, b))
        yield Sample(name + ": no bias", conv, (x, w))
        yield Sample(
            name + ": options", conv, (x, w[:, :2], b), {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}
        )
        yield Sample(name + ": positional", conv, (x, w, b, 2, 1))
        yield Sample(name + ": same", conv, (x, w, b), {"padding": "same"})
        yield Sample(name + ": depthwise", conv, (x, depthwise), {"groups": 4})
        yield Sample(name + ": unbatched", conv, (x[0], w, b))
        name = op_name(transposed)
        yield Sample(name, transposed, (x, w, b))
        yield Sample(
            name + ": options",
            transposed,
            (x, w[:, :2], ints(4, seed=1)),
            {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 2},
        )
        yield Sample(name + ": no bias", transposed, (x, w), {"stride": 2})


def embeddings() -> Iterator[Sample]:
    only_backward: tuple[Way, ...] = ("transpose",)  # the forward reads the padding row and knows of no frequencies
    yield Sample("embedding", F.embedding, (INDEX, ROWS))
    yield Sample("embedding: padding", F.embedding, (INDEX, ROWS, 2), ways=only_backward)
    yield Sample("embedding: negative padding", F.embedding, (INDEX, ROWS), {"padding_idx": -1}, ways=only_backward)
    yield Sample("embedding: padding 0", F.embedding, (INDEX, ROWS), {"padding_idx": 0}, ways=only_backward)
    # Counts 2, 4 and 2: their inverses are exact.
    often = torch.tensor([[0, 2, 2], [4, 2, 0], [4, 2, 1]])
    scaled = {"scale_grad_by_freq": True}
    # torch's second derivative forgets the frequencies: only the backward itself can judge.
    yield Sample("embedding: by frequency", F.embedding, (often, ROWS), scaled, ways=())
    yield Sample("embedding: by frequency, padding", F.embedding, (often, ROWS, -1), scaled, ways=())
    yield Sample("embedding: sparse", F.embedding, (INDEX, ROWS), {"sparse": True})
    yield Sample("embedding: sparse, padding", F.embedding, (INDEX, ROWS, 2), {"sparse": True}, ways=only_backward)
    yield Sample("embedding: scalar index", F.embedding, (torch.tensor(3), ROWS))
    yield Sample("embedding: max_norm", F.embedding, (INDEX, ROWS), {"max_norm": 1.0}, beyond=(1,))
    yield Sample("torch.embedding", torch.embedding, (ROWS, INDEX))
    yield Sample("torch.embedding: padding", torch.embedding, (ROWS, INDEX), {"padding_idx": 2}, ways=only_backward)
    yield Sample("torch.embedding: no padding", torch.embedding, (ROWS, INDEX, -1))
    yield Sample("torch.embedding: by frequency", torch.embedding, (ROWS, often, 4, True), ways=())
    name = "embedding_bag"
    none: tuple[Way, ...] = ()
    yield Sample(name + ": sum", F.embedding_bag, (BAGS, ROWS), {"mode": "sum"}, ways=none)
    yield Sample(name + ": mean", F.embedding_bag, (BAGS, ROWS), ways=none)
    yield Sample(name + ": offsets", F.embedding_bag, (INDEX.flatten(), ROWS, OFFSETS), {"mode": "sum"}, ways=none)
    yield Sample(
        name + ": weights",
        F.embedding_bag,
        (BAGS, ROWS),
        {"per_sample_weights": ints(2, 4), "mode": "sum"},
        ways=none,
    )
    yield Sample(
        name + ": last offset, padding, weights",
        F.embedding_bag,
        (INDEX.flatten(), ROWS, torch.tensor([0, 2, 6])),
        {
            "mode": "sum",
            "padding_idx": 2,
            "include_last_offset": True,
            "per_sample_weights": ints(6),
        },
        ways=none,
    )
    yield Sample(name + ": padding", F.embedding_bag, (BAGS, ROWS), {"mode": "sum", "padding_idx": -1}, ways=none)
    yield Sample(name + ": sparse", F.embedding_bag, (BAGS, ROWS), {"mode": "sum", "sparse": True}, ways=none)
    yield Sample(name + ": max", F.embedding_bag, (BAGS, ROWS), {"mode": "max"}, beyond=(1,))
    yield Sample(name + ": max_norm", F.embedding_bag, (BAGS, ROWS), {"max_norm": 1.0}, beyond=(1,))
    yield Sample(name + ": by frequency", F.embedding_bag, (BAGS, ROWS), {"mode": "sum", **scaled}, beyond=(1,))


def norms() -> Iterator[Sample]:
    x, w, b = ints(2, 4, 3), ints(3, seed=1), ints(3, seed=2)
    c, d = ints(4, seed=1), ints(4, seed=2)
    mean, var = ints(4, seed=3), ints(4, seed=4).abs() + 1
    op: Any
    for op in (F.layer_norm, torch.layer_norm):
        name = op_name(op)
        yield Sample(name, op, (x, (3,), w, b), beyond=(0,), exact=False)
        yield Sample(name + ": no bias", op, (x, (3,), w), {"eps": 0.5}, beyond=(0,), exact=False)
        yield Sample(name + ": bias alone", op, (x, (3,), None, b), beyond=(0, 2), exact=False)
        yield Sample(name + ": two axes", op, (x, (4, 3), ints(4, 3), ints(4, 3)), beyond=(0,), exact=False)
    for op in (F.group_norm, torch.group_norm):
        yield Sample(op_name(op), op, (x, 2, c, d), beyond=(0,), exact=False)
        yield Sample(op_name(op) + ": no bias", op, (x, 2, c), beyond=(0,), exact=False)
    for training in (False, True):
        note = ": training" if training else ": eval"
        flags = {"training": training}
        yield Sample("F.batch_norm" + note, F.batch_norm, (x, mean, var, c, d), flags, beyond=(0, 1, 2), exact=False)
        yield Sample(
            "torch.batch_norm" + note,
            torch.batch_norm,
            (x, c, d, None if training else mean, None if training else var, training, 0.1, 1e-5, False),
            beyond=(0,) if training else (0, 3, 4),
            exact=False,
        )
    for op in (F.rms_norm, torch.rms_norm):
        yield Sample(op_name(op), op, (x, (3,), w), beyond=(0,), exact=False)
        yield Sample(op_name(op) + ": eps", op, (x, (4, 3), ints(4, 3), 0.5), beyond=(0,), exact=False)


SAMPLES = [
    *products(),
    *sums_and_views(),
    *additions(),
    *weighted(),
    *convolutions(),
    *embeddings(),
    *norms(),
]

NAMES = [sample.name for sample in SAMPLES]
COVERED = [sample for sample in SAMPLES if sample.covered()]
REAL = [s for s in COVERED if any(not s.leaves[slot].is_complex() for slots in s.covered() for slot in slots)]


def test_samples_cover_every_rule() -> None:
    # The rule for the end of a vmap is held by tests/losses/test_per_example.py.
    assert {sample.op for sample in COVERED} == set(registered()) - {gathered}
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_rule_covers_what_it_should(sample: Sample) -> None:
    covered = sample.covered()
    assert sample.floats
    for tracked in sample.sets():
        assert covered_by_rule(sample.call(tracked)) == (tracked in covered), tracked


def tangents_of(sample: Sample, tracked: tuple[int, ...]) -> list[Tensor]:
    found = []
    for slot in tracked:
        leaf = sample.leaves[slot]
        real, imaginary = ints(*leaf.shape, seed=20 + slot), ints(*leaf.shape, seed=30 + slot)
        found.append((torch.complex(real, imaginary) if leaf.is_complex() else real).to(leaf.dtype))
    return found


def pushed(sample: Sample, tracked: tuple[int, ...], way: Way) -> Outputs:
    push = pushforward(sample.call(tracked), way)
    return push.evaluate([sample.leaves[slot] for slot in push.needed], tangents_of(sample, tracked))


def eps(*values: Tensor) -> float:
    return max(torch.finfo(value.dtype).eps for value in values)


@pytest.mark.parametrize("sample", COVERED, ids=[sample.name for sample in COVERED])
def test_rule_is_what_the_op_itself_offers(sample: Sample) -> None:
    for tracked in sample.covered():
        by_rule = pushed(sample, tracked, "rule")
        for way in sample.ways:
            for found, wanted in zip(by_rule, pushed(sample, tracked, way), strict=True):
                assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
                if sample.exact:
                    assert torch.equal(found, wanted), (tracked, way)
                else:  # entries are sums of at most a hundred products
                    allowed = 100 * eps(wanted) * float(wanted.abs().max())
                    assert float((found - wanted).abs().max()) <= allowed, (tracked, way)


def real_inner(a: Tensor, b: Tensor) -> Tensor:
    product = a.conj() * b
    return product.real.double() if product.is_complex() else product.double()


@pytest.mark.parametrize("sample", COVERED, ids=[sample.name for sample in COVERED])
def test_rule_is_adjoint_to_the_backward(sample: Sample) -> None:
    # <u, J V> = <J^T u, V> with J^T by the op's single backward, which is what training runs.
    for tracked in sample.covered():
        slopes = pushed(sample, tracked, "rule")
        leaves = {slot: sample.leaves[slot].clone().requires_grad_() for slot in tracked}
        values = sample.run(leaves)
        cotangents = [ints(*value.shape, seed=40 + i).to(value.dtype) for i, value in enumerate(values)]
        if values[0].requires_grad:
            gradients = torch.autograd.grad(values, list(leaves.values()), cotangents, materialize_grads=True)
        else:  # an argument that is looked at for its dtype or shape alone
            gradients = tuple(torch.zeros_like(leaf) for leaf in leaves.values())
        left = [real_inner(u, slope) for u, slope in zip(cotangents, slopes, strict=True)]
        pairs = zip(gradients, tangents_of(sample, tracked), strict=True)
        right = [real_inner(g.to_dense(), tangent) for g, tangent in pairs]
        found, wanted = (float(sum(part.sum() for part in side)) for side in (left, right))
        size = float(sum(part.abs().sum() for part in (*left, *right)))
        assert abs(found - wanted) <= (0.0 if sample.exact else 100 * eps(*values) * size), tracked


def seen_op(sample: Sample) -> Any:
    """The op as a mode sees it: `a @ b` and `Tensor.__matmul__` come as `Tensor.matmul`."""
    seen: list[Any] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(op)
            return op(*args, **(kwargs or {}))

    with Watch():
        args, kwargs = optree.tree_unflatten(flatten_call(sample.args, sample.kwargs)[1], sample.leaves)
        sample.op(*args, **kwargs)
    return seen[0]


def reached_slot(sample: Sample) -> int:
    """The first argument under the rule that the op has a gradient for."""
    for (slot,) in (slots for slots in sample.covered() if len(slots) == 1):
        leaf = sample.leaves[slot].clone().requires_grad_()
        values = [value for value in sample.run({slot: leaf}) if value.requires_grad]
        if values and not leaf.is_complex():
            (gradient,) = torch.autograd.grad(values, leaf, [torch.ones_like(v) for v in values])
            if bool(gradient.to_dense().any()):
                return slot
    raise AssertionError(f"{sample.name}: no argument has a gradient")


def features(values: Outputs) -> Tensor:
    flat = [(torch.view_as_real(value) if value.is_complex() else value).reshape(-1).double() for value in values]
    return torch.cat(flat) if len(flat) > 1 else flat[0]


def broken(rule: Rule, by: float) -> Rule:
    """The rule with a result that is off by a factor."""

    def factor(arguments: Any) -> Tensor:
        own = rule.factor(arguments) if rule.factor else None
        wrong = torch.tensor(by, dtype=torch.float64)
        return wrong if own is None else own * wrong

    return replace(rule, factor=factor)


def assert_broken_rule_is_caught(
    op: Any, losses: Callable[[Params, Any], Tensor], params: Params, batch: Any, by: float = 1.01
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rules._RULES, op, broken(registered()[op], by))
        direction = {name: torch.zeros_like(value) for name, value in params.items()}
        with pytest.raises(fg.ConservationError, match=r"scores do not add up for parameters \['w'\]"):
            fg.grad_and_reduce(losses)(params, batch, fg.dot(direction))


# What a mode never sees by itself (`a + b` comes as `Tensor.add`) is tested through the rule that it does see.
@pytest.mark.parametrize("sample", REAL, ids=[sample.name for sample in REAL])
def test_rule_of_a_disguise_is_right_and_broken_is_caught(sample: Sample) -> None:
    # The op makes features of a parameter, which every sample then reads: no sample axis, the tangent is carried.
    slot, op = reached_slot(sample), seen_op(sample)
    params = {"w": sample.leaves[slot].clone()}

    def losses(params: Params, x: Tensor) -> Tensor:
        return torch.inner(x, features(sample.run({slot: params["w"]}))).square()

    x = torch.randn(3, len(features(sample.run({}))), dtype=torch.float64)
    direction = {"w": torch.randn_like(params["w"])}
    site = next(site for site in fg.plan(losses, params, x).sites if site.op == op_name(op))
    assert (site.action, site.way) == ("carry", "rule")
    found = fg.reduce(losses)(params, x, fg.dot(direction))
    wanted = expected(losses, params, x, direction)
    # The tolerance is that of the lowest precision on the way: float32 casts, bfloat16 casts, grouped products.
    lowest = max(eps(params["w"]), *(eps(value) for value in sample.run({})))
    assert_scores(found, wanted, 100 * lowest)
    assert_broken_rule_is_caught(op, losses, params, x, by=2.0 if op is T.bfloat16 else 1.01)


@dataclass(frozen=True, eq=False)
class Natural:
    """A small loss in which a parameter meets the samples in this op: the score is taken behind it."""

    op: Any
    weight: Tensor
    batch: Tensor
    apply: Callable[[Tensor, Tensor], Tensor]
    axis: int = 0

    def losses(self, params: Params, x: Tensor) -> Tensor:
        return self.apply(x, params["w"]).sin().movedim(self.axis, 0).reshape(len(x), -1).sum(1)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def naturals() -> Iterator[Natural]:
    x, w = normal(3, 4), normal(4, 2)
    yield Natural(F.linear, normal(2, 4), x, F.linear)
    yield Natural(torch.mm, w, x, torch.mm)
    yield Natural(T.mm, w, x, T.mm)
    yield Natural(torch.mv, normal(4), x, torch.mv)
    yield Natural(T.mv, normal(4), x, T.mv)
    yield Natural(torch.outer, normal(4), normal(3), torch.outer)
    yield Natural(torch.matmul, w, normal(3, 5, 4), torch.matmul)
    yield Natural(T.matmul, w, normal(3, 5, 4), lambda x, w: x @ w)
    yield Natural(T.__rmatmul__, w, normal(3, 5, 4), lambda x, w: T.__rmatmul__(w, x))
    yield Natural(torch.bmm, normal(2, 4, 2), normal(3, 2, 4), lambda x, w: torch.bmm(x.transpose(0, 1), w), 1)
    yield Natural(T.bmm, normal(2, 4, 2), normal(3, 2, 4), lambda x, w: T.bmm(x.transpose(0, 1), w), 1)
    yield Natural(torch.einsum, w, normal(3, 5, 4), lambda x, w: torch.einsum("btd,dp->tbp", x, w), 1)
    yield Natural(torch.mul, normal(4), x, torch.mul)
    yield Natural(T.mul, normal(4), x, lambda x, w: 2 * x * w)
    yield Natural(torch.add, normal(4), x, lambda x, w: torch.add(x, w, alpha=3))
    yield Natural(T.add, normal(4), x, lambda x, w: x + w)
    yield Natural(torch.sub, normal(4), x, lambda x, w: torch.sub(w, x, alpha=2))
    yield Natural(T.sub, normal(4), x, lambda x, w: x - w)
    yield Natural(torch.div, normal(4), x + 9, lambda x, w: torch.div(w, x))
    yield Natural(T.div, normal(4), x + 9, lambda x, w: w / x)
    yield Natural(torch.addmm, normal(2), x, lambda x, w: torch.addmm(w, x, normal(4, 2)))
    yield Natural(T.addmm, w, x, lambda x, w: T.addmm(normal(2), x, w))
    yield Natural(torch.baddbmm, w[None], normal(3, 5, 4), lambda x, w: torch.baddbmm(normal(2), x, w.expand(3, 4, 2)))
    yield Natural(T.baddbmm, normal(2), normal(3, 5, 4), lambda x, w: T.baddbmm(w, x, normal(3, 4, 2)))
    yield Natural(torch.cat, normal(1, 2), x, lambda x, w: torch.cat([x, w.expand(3, 2)], 1))
    yield Natural(torch.stack, normal(4), x, lambda x, w: torch.stack([x, w.expand(3, 4)], 1))
    yield Natural(F.embedding, w, torch.tensor([[0, 1, 1], [3, 0, 2]]), lambda x, w: F.embedding(x, w, padding_idx=1))
    yield Natural(F.embedding_bag, w, torch.tensor([[0, 1, 1], [3, 0, 2]]), F.embedding_bag)
    yield Natural(T.__getitem__, w, torch.tensor([[0, 1, 1], [3, 0, 2]]), lambda x, w: w[x])
    image, mean, var = normal(3, 4, 6), normal(4), normal(4).abs() + 1
    yield Natural(F.layer_norm, normal(6), image, lambda x, w: F.layer_norm(x, (6,), w))
    yield Natural(torch.layer_norm, normal(6), image, lambda x, w: torch.layer_norm(x, (6,), normal(6), w))
    yield Natural(F.rms_norm, normal(6), image, lambda x, w: F.rms_norm(x, (6,), w))
    yield Natural(torch.rms_norm, normal(6), image, lambda x, w: torch.rms_norm(x, (6,), w))
    yield Natural(F.group_norm, normal(4), image, lambda x, w: F.group_norm(x, 2, w, normal(4)))
    yield Natural(torch.group_norm, normal(4), image, lambda x, w: torch.group_norm(x, 2, normal(4), w))
    yield Natural(F.batch_norm, normal(4), image, lambda x, w: F.batch_norm(x, mean, var, w))
    yield Natural(
        torch.batch_norm,
        normal(4),
        image,
        lambda x, w: torch.batch_norm(x, normal(4), w, mean, var, False, 0.1, 1e-5, False),
    )
    for n, (conv, back) in enumerate(
        ((F.conv1d, F.conv_transpose1d), (F.conv2d, F.conv_transpose2d), (F.conv3d, F.conv_transpose3d)), 1
    ):
        yield Natural(conv, normal(5, 2, *(3,) * n), normal(3, 4, *(4,) * n)[:, :2], _with(conv, stride=2, padding=1))
        yield Natural(back, normal(2, 5, *(3,) * n), normal(3, 4, *(4,) * n)[:, :2], _with(back, stride=2))


def _with(op: Any, **options: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: op(x, w, **options)


NATURALS = list(naturals())


@pytest.mark.parametrize("natural", NATURALS, ids=[op_name(natural.op) for natural in NATURALS])
def test_rule_at_a_sample_axis_is_right_and_broken_is_caught(natural: Natural) -> None:
    params = {"w": natural.weight}
    plan = fg.plan(natural.losses, params, natural.batch)
    site = next(site for site in plan.sites if site.op == op_name(natural.op))
    assert (site.action, site.way, [str(layout) for layout in site.layouts]) == (
        "tap",
        "rule",
        [f"axis {natural.axis}"],
    )
    direction = {"w": torch.randn_like(natural.weight)}
    found = fg.reduce(natural.losses)(params, natural.batch, fg.dot(direction))
    assert_scores(found, expected(natural.losses, params, natural.batch, direction))
    assert_broken_rule_is_caught(natural.op, natural.losses, params, natural.batch)


def test_grouped_mm_of_experts_is_right_and_broken_is_caught() -> None:
    # Rows are gathered per expert: no layout fits, and there is no float64.
    weight, x = normal(2, 16, 8).float(), normal(6, 16).float()

    def losses(params: Params, x: Tensor) -> Tensor:
        order = torch.tensor([4, 1, 0, 5, 2, 3])
        ends = torch.tensor([2, 6], dtype=torch.int32)
        rows = F.grouped_mm(x[order], params["w"], offs=ends)
        return torch.zeros_like(rows).index_copy(0, order, rows).sin().sum(1)

    direction = {"w": torch.randn_like(weight)}
    (site, *_) = fg.plan(losses, {"w": weight}, x).sites
    assert (site.action, site.way) == ("carry", "rule")
    found = fg.reduce(losses)({"w": weight}, x, fg.dot(direction))
    assert_scores(found, expected(losses, {"w": weight}, x, direction), 1e-5)
    seen = seen_op(Sample("", F.grouped_mm, (F32A, F32B), {"offs": GROUPS}))
    assert_broken_rule_is_caught(seen, losses, {"w": weight}, x)


def test_register_rule_refuses_what_is_no_rule() -> None:
    with pytest.raises(fg.InputError, match="linear must be 'each', 'jointly' or sets of names, found 'weight'"):
        register_rule(F.linear, linear="weight")
    with pytest.raises(fg.InputError, match=r"no arguments \['wieght'\] among \('input', .*Pass arguments="):
        register_rule(F.layer_norm, linear=[["wieght"]])
    with pytest.raises(fg.InputError, match=r"cross.*shows no signature. Pass arguments="):
        register_rule(torch.cross, linear=[["input"]])
    assert torch.cross not in registered()
    # The remedy.
    register_rule(torch.cross, linear=[["input"], ["other"]], arguments=["input", "other"])
    assert registered()[torch.cross].linear == (("input",), ("other",))


def cross_losses(params: Params, x: Tensor) -> Tensor:
    return torch.cross(x, params["w"].expand_as(x), dim=1).exp().sum(1)


@pytest.mark.parametrize("linear", ["each", [["input"], ["other"]]])
def test_rule_of_the_user_is_used(linear: Any) -> None:
    params, x, direction = {"w": normal(3)}, normal(4, 3), {"w": normal(3).flip(0)}
    without = fg.plan(cross_losses, params, x)
    assert [site.way for site in without.sites if "cross" in site.op] == ["forward"]
    register_rule(torch.cross, linear=linear, arguments=["input", "other"])
    plan = fg.plan(cross_losses, params, x)
    assert [site.way for site in plan.sites if "cross" in site.op] == ["rule"]
    found = fg.reduce(cross_losses, plan=plan)(params, x, fg.dot(direction))
    assert_scores(found, expected(cross_losses, params, x, direction))


def hypot_losses(params: Params, x: Tensor) -> Tensor:
    return torch.hypot(x, params["w"].expand_as(x)).sum(1)


@pytest.mark.parametrize("linear", ["each", "jointly", [["other"]]])
def test_wrong_rule_of_the_user_is_caught(linear: Any) -> None:
    params, x = {"w": normal(3)}, normal(4, 3)
    register_rule(torch.hypot, linear=linear, arguments=["input", "other"])
    with pytest.raises(fg.ConservationError, match=r"parameters \['w'\].*correct the rule given to fg.register_rule"):
        fg.reduce(hypot_losses)(params, x, fg.dot(params))


@pytest.mark.parametrize("linear", ["each", "jointly", [["input"]]])
def test_rule_holds_only_when_it_says_so(linear: Any) -> None:
    # A power is linear in its base for the exponent 1 alone.
    register_rule(torch.pow, linear=linear, arguments=["input", "exponent"], when=lambda a: a["exponent"] == 1)
    x = normal(4, 3)
    for exponent, way in ((1, "rule"), (2, "forward")):

        def losses(params: Params, x: Tensor, exponent: int = exponent) -> Tensor:
            return x @ torch.pow(params["w"], exponent)

        params, direction = {"w": normal(3)}, {"w": normal(3).flip(0)}
        plan = fg.plan(losses, params, x)
        assert [site.way for site in plan.sites if "pow" in site.op] == [way]
        found = fg.reduce(losses)(params, x, fg.dot(direction))
        assert_scores(found, expected(losses, params, x, direction))


def test_factor_of_the_user_is_applied() -> None:
    # The forward is 2v - v, the backward 2v: as with embeddings, the gradient is not that of the forward.
    def doubled(value: Tensor) -> Tensor:
        if torch.overrides.has_torch_function_unary(value):
            return torch.overrides.handle_torch_function(doubled, (value,), value)
        return 2 * value - value.detach()

    register_rule(doubled, linear=[["value"]], factor=lambda a: torch.tensor(2.0, dtype=torch.float64))

    def losses(params: Params, x: Tensor) -> Tensor:
        return x @ doubled(params["w"])

    params, x, direction = {"w": normal(3)}, normal(4, 3), {"w": normal(3).flip(0)}
    (site, *_) = fg.plan(losses, params, x).sites
    assert (site.op.rsplit(".", 1)[-1], site.way) == ("doubled", "rule")
    assert_scores(fg.reduce(losses)(params, x, fg.dot(direction)), expected(losses, params, x, direction))


def test_what_a_rule_leaves_to_other_ways_is_exact() -> None:
    x, params, direction = normal(3, 4), {"w": normal(4)}, {"w": normal(4).flip(0)}

    def beside_integers(params: Params, x: Tensor) -> Tensor:
        rows = torch.cat([x, params["w"].expand(3, 4), torch.arange(4).expand(3, 4)], 1)
        return (rows * torch.stack([params["w"], torch.arange(4)]).sum()).sin().sum(1)

    def rounded(params: Params, x: Tensor) -> Tensor:
        return (x @ params["w"]) * torch.div(params["w"], 0.3, rounding_mode="floor").sum()

    for losses in (beside_integers, rounded):
        found = fg.reduce(losses)(params, x, fg.dot(direction))
        assert_scores(found, expected(losses, params, x, direction))


@pytest.mark.parametrize("flags", [(1,), (-1, True), (3, True)])
def test_embedding_under_its_other_name_is_exact(flags: tuple[Any, ...]) -> None:
    # As `F.embedding`, its gradient leaves out the padding row and is scaled, which its forward derivative does not.
    index, params = torch.tensor([[0, 1, 1], [3, 0, 2]]), {"w": normal(4, 2)}

    def losses(params: Params, x: Tensor) -> Tensor:
        return torch.embedding(params["w"], x, *flags).sin().sum((1, 2))

    direction = {"w": torch.randn_like(params["w"])}
    found = fg.reduce(losses)(params, index, fg.dot(direction))
    assert_scores(found, expected(losses, params, index, direction))
