"""Rules where samples have an axis, of the user, and what they leave to other ways."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcghost as fg
from funcghost.ops.digest import op_name
from funcghost.ops.rules import register_rule, registered
from tests.models.op_calls import F32A, F32B, GROUPS, Params, Sample, T, assert_broken_rule_is_caught, seen_op
from tests.naive import assert_scores, expected


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
