"""Every rule against the op itself, and broken rules against the law."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcghost as fg
from funcghost.losses.examples import gathered
from funcghost.ops.call import Outputs
from funcghost.ops.digest import op_name
from funcghost.ops.rules import registered
from funcghost.ops.tangent import Way, covered_by_rule, pushforward
from tests.models.op_calls import F32A, F32B, GROUPS, Params, Sample, T, assert_broken_rule_is_caught, ints, seen_op
from tests.naive import assert_scores, expected


def halves(*shape: int, seed: int = 0) -> Tensor:
    """Powers of two of either sign: dividing by them is exact."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return sign * torch.exp2(torch.randint(-2, 3, shape, generator=generator).double())


A, B, C = ints(3, 4), ints(4, 2, seed=1), ints(3, 4, seed=2)


V4, W4 = ints(4, seed=3), ints(4, seed=4)


BA, BB = ints(2, 3, 4, seed=5), ints(2, 4, 2, seed=6)


INDEX = torch.tensor([[0, 2, 2], [4, 2, 0]])


BAGS = torch.tensor([[0, 2, 2, 1], [4, 2, 0, 1]])


ROWS = ints(5, 2, seed=7)


OFFSETS = torch.tensor([0, 2, 4, 4])


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
    yield Sample("to: double", T.to, (A.float(),), {"dtype": torch.float64})
    yield Sample("to: bfloat16", T.to, (A,), {"dtype": torch.bfloat16})
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
    # Held elsewhere: the rule for the end of a vmap by tests/losses/test_per_example.py, that for duals, which are
    # nothing outside of their level, by tests/engine/test_unseen.py.
    assert {sample.op for sample in COVERED} == set(registered()) - {gathered, torch._VF._make_dual}
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
    assert_broken_rule_is_caught(op, losses, params, x, by=2.0 if sample.name == "to: bfloat16" else 1.01)
