"""The same step under compilers, autocast, other dtypes and devices, dropout, buffers that change."""

import logging
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import funcghost as fg
from tests.depth import DEEP, thinned
from tests.models.small import GPT, like, next_token, rows, small_gpt
from tests.naive import assert_close, assert_scores, assert_trees_close, expected, gradient
from tests.versions import compiles


# What the first does the second does, too; the last takes more than a minute.
@pytest.mark.parametrize("backend", thinned(["eager", "aot_eager", "inductor"], ["aot_eager"]))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@compiles
def test_compiled_step_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    model, losses, params = small_gpt(layers=1)
    model.double()
    batch, direction = rows(), like(params)
    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch))
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for size, length in ((4, 12), (6, 7)):  # other sizes than those planned with
        batch = rows(size, length)
        eager, found = step(params, batch, {"v": fg.dot(direction)}), compiled(params, batch, {"v": fg.dot(direction)})
        assert_scores(found.reduced["v"], expected(losses, params, batch, direction))
        assert_close(found.losses, eager.losses, 1e-12)
        assert_trees_close(found.grads, eager.grads)
    model.scale.mul_(2.0)  # a buffer the losses close over is read, not baked in
    assert_scores(
        compiled(params, batch, {"v": fg.dot(direction)}).reduced["v"], expected(losses, params, batch, direction)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@compiles
def test_a_step_compiled_by_inductor_equals_eager() -> None:
    """Of a small program, once: the code of each of its kernels takes seconds to compile."""
    torch._dynamo.reset()
    params = {"w": torch.randn(3, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ torch.cat([p["w"][1:], p["b"][None]]).t()).square().sum((1, 2))

    x, direction = torch.randn(4, 5, 3, dtype=torch.float64), like(params)
    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, x))
    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    x = torch.randn(6, 7, 3, dtype=torch.float64)  # other sizes than those planned with
    eager, found = step(params, x, fg.dot(direction)), compiled(params, x, fg.dot(direction))
    assert_scores(found.reduced, expected(losses, params, x, direction))
    assert_close(found.losses, eager.losses, 1e-12)
    assert_trees_close(found.grads, eager.grads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@compiles
def test_every_reducer_compiled_for_other_sizes() -> None:
    torch._dynamo.reset()
    model, losses, params = small_gpt(layers=1)
    model.double()
    low = fg.compress(like(params), rank=2)
    reducers = (fg.squared_norm(), fg.gram(), fg.cross(1), fg.project(4), fg.dot(low), fg.per_param(fg.squared_norm()))
    score = fg.reduce(losses, plan=fg.plan(losses, params, rows(), reducers))
    compiled = torch.compile(score, fullgraph=True, backend="eager")
    sizes = ((4, 12), (6, 7), (5, 8))  # from the second on, sizes are symbols
    for size, length in sizes if DEEP else sizes[:2]:
        batch = rows(size, length)
        found, wanted = (optree.tree_leaves(f(params, batch, reducers)) for f in (compiled, score))
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, 1e-12)


@pytest.mark.parametrize("kind", ["disguises", "per example", "carried", "scoring"])
@compiles
def test_compiled_where_identity_matters(kind: str) -> None:
    torch._dynamo.reset()
    params = {"w": torch.randn(3, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    x, direction = torch.randn(4, 5, 3, dtype=torch.float64), like(params)

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.tanh(x @ p["w"].T) @ torch.cat([p["w"][1:], p["b"][None]]).t()
        if kind == "carried":
            h = h - h.mean(0, keepdim=True)
        h.add_(p["b"])
        return torch.tanh(h).square().sum((1, 2))

    if kind == "per example":
        losses = fg.per_example(lambda p, x: torch.tanh((x @ p["w"].T) @ p["w"] + p["b"]).square().sum())  # type: ignore[assignment]
    plan = fg.plan(losses, params, x)
    step: Any = fg.reduce(losses, plan=plan) if kind == "scoring" else fg.grad_and_reduce(losses, plan=plan)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(
        params, x, fg.dot(fg.stack([direction, direction]))
    )
    scores = found if kind == "scoring" else found.reduced
    assert_scores(scores[:, 1], expected(losses, params, x, direction))


def test_step_traces_with_make_fx() -> None:
    _, losses, params = small_gpt(layers=1)
    batch, direction = rows(), like(params)
    step = fg.grad_and_reduce(losses, plan=fg.plan(losses, params, batch))

    def scores(tokens: Tensor) -> Tensor:
        out: Tensor = step(params, (tokens,), fg.dot(direction)).reduced
        return out

    traced = make_fx(scores)(batch[0])
    other = rows()[0]
    assert torch.allclose(traced(other), scores(other), rtol=1e-5)


def test_meta_device_proves_that_nothing_is_created_elsewhere() -> None:
    model, losses, params = small_gpt(dropout=0.1)
    batch, direction = rows(), like(params)
    plan = fg.plan(losses, params, batch)
    model.to("meta")
    meta = dict(model.named_parameters())
    away = {k: v.to("meta") for k, v in direction.items()}
    out = fg.grad_and_reduce(losses, plan=plan)(
        meta, (batch[0].to("meta"),), [fg.dot(away), fg.dot(fg.stack([away, away]))]
    )
    assert all(t.is_meta for t in (out.losses, *out.reduced, *out.grads.values()))
    assert out.reduced[1].shape == (4, 2)
    assert fg.reduce(losses, plan=plan)(meta, (batch[0].to("meta"),), fg.dot(away)).is_meta
    with pytest.raises(fg.PlanError, match="meta"):
        fg.reduce(losses)(meta, (batch[0].to("meta"),), fg.dot(away))


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    model, losses, params = small_gpt()
    batch, direction = rows(), like(params)
    wanted = fg.grad_and_reduce(losses)(params, batch, fg.dot(direction))
    model.cuda()
    on = {k: v.cuda() for k, v in direction.items()}
    found = fg.grad_and_reduce(losses)(dict(model.named_parameters()), (batch[0].cuda(),), fg.dot(on))
    assert_close(found.reduced.cpu(), wanted.reduced, 1e-3)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_to_bfloat16_costs_what_autocast_costs(inside: bool) -> None:
    _, losses, params = small_gpt(width=32)
    batch, direction = rows(8), like(params)

    def cast(p: Any, b: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(p, b).float()

    wanted, size = expected(cast, params, batch, direction)
    exact = expected(losses, params, batch, direction)[0]
    if inside:
        found = fg.grad_and_reduce(cast)(params, batch, fg.dot(direction)).reduced
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = fg.grad_and_reduce(losses)(params, batch, fg.dot(direction)).reduced
    assert found.dtype == torch.float32
    # The distance to naive gradients under the same autocast is of the order of autocast's own error.
    assert float((found - wanted).norm()) <= 2 * float((wanted - exact).norm()) + 1e-6 * float(size.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameter_dtypes(dtype: torch.dtype) -> None:
    model, losses, params = small_gpt(width=32)
    model.to(dtype)
    batch, direction = rows(8), like(params)
    wanted = expected(losses, params, batch, direction)
    out = fg.grad_and_reduce(losses)(params, batch, fg.dot(direction))
    assert out.reduced.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(g.dtype == dtype for g in out.grads.values())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_scores(out.reduced, (wanted[0].to(out.reduced.dtype), wanted[1].to(out.reduced.dtype)), tolerance)


def test_dropout_draws_what_a_plain_step_draws() -> None:
    model, losses, params = small_gpt(dropout=0.3)
    model.double()
    batch, direction = rows(), like(params)
    state = torch.get_rng_state()
    grads, values = gradient(losses, params, batch)
    after = torch.get_rng_state()
    step = fg.grad_and_reduce(losses)
    for _ in range(2):
        torch.set_rng_state(state)
        out = step(params, batch, fg.dot(direction))
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(out.losses, values)
        assert_trees_close(out.grads, grads)


def test_every_direction_meets_the_random_numbers_of_the_forward() -> None:
    """A bias that goes into attention with dropout, whose derivative is the op run again."""
    params, x = {"bias": torch.randn(5, 5, dtype=torch.float64)}, torch.randn(3, 1, 5, 4, dtype=torch.float64)

    def losses(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(x, x, x, attn_mask=p["bias"], dropout_p=0.4)
        return h.sin().flatten(1).sum(1)

    directions, state = [like(params), like(params), like(params)], torch.get_rng_state()
    score = fg.reduce(losses)
    for _ in range(2):
        torch.set_rng_state(state)
        found = score(params, x, fg.dot(fg.stack(directions)))
        for k, direction in enumerate(directions):
            torch.set_rng_state(state)
            assert_scores(found[:, k], expected(losses, params, x, direction))


def test_buffers_change_as_in_one_plain_step() -> None:
    def made() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    x, plain, ours = torch.randn(5, 6), made(), made()
    fg.module_losses(plain, lambda out, batch: out.square().sum(1))(dict(plain.named_parameters()), x)
    params = dict(ours.named_parameters())
    fg.grad_and_reduce(fg.module_losses(ours, lambda out, batch: out.square().sum(1)))(params, x, fg.dot(like(params)))
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(ours.named_buffers())[name], buffer)
        assert "num_batches" not in name or int(buffer) == 1


def test_checkpointing_through_a_users_model() -> None:
    class Checkpointed(GPT):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=fg.checkpoint_context)
            return torch.nn.functional.linear(self.norm(x), self.tokens.weight)

    model = Checkpointed(dropout=0.2).double()
    losses, params = fg.module_losses(model, next_token), dict(model.named_parameters())
    batch, direction, state = rows(), like(params), torch.get_rng_state()
    wanted = expected(losses, params, batch, direction)
    torch.set_rng_state(state)
    assert_scores(fg.grad_and_reduce(losses)(params, batch, fg.dot(direction)).reduced, wanted)
    torch.set_rng_state(state)
    assert_scores(fg.reduce(losses)(params, batch, fg.dot(direction)), wanted)


def test_microbatches_give_the_same_scores() -> None:
    model, losses, params = small_gpt()
    model.double()
    batch, direction = rows(6), like(params)
    score = fg.reduce(losses)
    parts = [score(params, (part,), fg.dot(direction)) for part in batch[0].split([1, 2, 3])]
    assert_scores(torch.cat(parts), expected(losses, params, batch, direction))


class Sample:
    """An object no tree library knows."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_batches_of_any_form() -> None:
    params: Any = {"layers": [{"w": torch.randn(3, 2)}, (torch.randn(2),)]}
    direction = optree.tree_map(torch.randn_like, params)
    x = torch.randn(4, 3)

    def scored(h: Tensor, p: Any) -> Tensor:
        return (torch.tanh(h @ p["layers"][0]["w"]) * p["layers"][1][0]).sum(1)

    wanted = fg.reduce(lambda p, b: scored(b, p))(params, x, fg.dot(direction))
    forms: list[tuple[Any, Any]] = [
        ({"a": {"b": x}}, lambda b: b["a"]["b"]),
        ((x, "text", None, 3), lambda b: b[0]),
        (Sample(x), lambda b: b.x),
        ([Sample(x)], lambda b: b[0].x),
    ]
    for form, take in forms:

        def losses(p: Any, b: Any, take: Any = take) -> Tensor:
            return scored(take(b), p)

        found = fg.grad_and_reduce(losses)(params, form, {"r": (fg.dot(direction),)})
        assert torch.allclose(found.reduced["r"][0], wanted)
        assert optree.tree_structure(found.grads) == optree.tree_structure(params)


def test_aux_comes_detached_and_no_reducers_give_the_plain_step() -> None:
    params, x = {"w": torch.randn(3, 2)}, torch.randn(4, 3)

    def losses(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = x @ p["w"]
        return logits.square().sum(1), {"logits": logits}

    out = fg.grad_and_reduce(losses, has_aux=True)(params, x, {})
    assert out.reduced == {}
    assert not out.aux["logits"].requires_grad
    assert torch.equal(out.aux["logits"], x @ params["w"])
    both = fg.grad_and_reduce(losses, has_aux=True)(params, x, fg.dot(params))
    assert torch.equal(both.grads["w"], out.grads["w"])


def test_a_plan_is_made_once(caplog: pytest.LogCaptureFixture) -> None:
    model, losses, params = small_gpt()
    step = fg.grad_and_reduce(losses)
    with caplog.at_level(logging.INFO, "funcghost"):
        for _ in range(3):
            step(params, rows(), fg.dot(like(params)))
    assert sum("planned" in record.message for record in caplog.records) == 1
    model.eval()
