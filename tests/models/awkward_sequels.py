"""Steps that follow one another on other batches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.models.awkward_cases import Params, graph, normal, packed_by_lengths, rows, squares

# -- steps that follow one another --------------------------------------------------------------------


class Sequel(NamedTuple):
    """One loss on one batch after the other; `plans` is how many it takes, if that matters."""

    losses: Callable[[Params, Any], Tensor]
    params: Params
    batches: list[Any]
    plans: int | None


SEQUELS: dict[str, Callable[[], Sequel]] = {}


def sequel(
    batches: Callable[[], list[Any]], plans: int | None = 1, **sizes: tuple[int, ...]
) -> Callable[[Callable[[Params, Any], Tensor]], Callable[[Params, Any], Tensor]]:
    """Steps from their losses, and the shapes of the parameters."""

    def add(losses: Callable[[Params, Any], Tensor]) -> Callable[[Params, Any], Tensor]:
        def make() -> Sequel:
            return Sequel(losses, {k: normal(*size) for k, size in sizes.items()}, batches(), plans)

        SEQUELS[losses.__name__] = make
        return losses

    return add


def with_rows(*others: Any) -> Callable[[], list[Any]]:
    """New rows [4, 6] for each of the others."""
    return lambda: [(rows(), other) for other in others]


def shares(*lines: Sequence[float]) -> Tensor:
    return torch.tensor(lines, dtype=torch.float64)


@sequel(lambda: [normal(b, t, 6) for b, t in ((4, 5), (2, 5), (7, 3), (5, 5), (4, 1), (4, 5))], w=(6, 6), v=(6, 2))
def other_batch_sizes_and_lengths(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x.transpose(0, 1) @ p["w"])
    return squares((h.cumsum(0) @ p["v"]).transpose(0, 1))


@sequel(lambda: [normal(b, 5, 6) for b in (1, 4, 1, 3, 1)], plans=2, w=(6, 6), v=(6, 2))
def one_sample_and_then_more(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tanh(x.transpose(0, 1) @ p["w"]).transpose(0, 1) @ p["v"])


@sequel(lambda: [normal(b, 5, 6) for b in (4, 1, 2, 1)], w=(6, 6), v=(6, 2))
def more_samples_and_then_one(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tanh(x.transpose(0, 1) @ p["w"]).transpose(0, 1) @ p["v"])


@sequel(lambda: [normal(4, 5, 6) for _ in range(6)], router=(6, 3), experts=(3, 6, 6), w=(6, 6))
def experts_in_sorted_order(p: Params, x: Tensor) -> Tensor:
    h = (x @ p["w"]).tanh().flatten(0, 1)
    gate, chosen = (h @ p["router"]).softmax(-1).max(-1)
    order = chosen.argsort(stable=True)
    found = torch.einsum("nd,ndp->np", h[order], p["experts"][chosen[order]]).tanh() * gate[order, None]
    return squares(found[order.argsort()].view_as(x))


@sequel(lambda: [(normal(4, 5, 6), torch.randint(0, 5, (4,))) for _ in range(5)], w=(6, 3), v=(3, 2))
def pooled_at_other_indices(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, last = batch
    return squares(torch.tanh(x @ p["w"])[torch.arange(len(x)), last] @ p["v"])


@sequel(lambda: [(normal(4, 5, 6), torch.rand(4, 5) < 0.7) for _ in range(4)], w=(6, 6), v=(6, 2))
def other_masks_within_samples(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, seen = batch
    seen = seen | ~seen.any(1, keepdim=True)
    h = x @ p["w"]
    scores = (h @ h.mT).masked_fill(~seen[:, None], -torch.inf)
    return squares((scores.softmax(-1) @ h @ p["v"]) * seen.unsqueeze(-1))


@sequel(lambda: [normal(4, 5, 6) * size for size in (1.0, 0.01, 1.0, 0.2, 0.01)], plans=2, w=(6, 6), out=(4, 6, 2))
def depth_by_data(p: Params, x: Tensor) -> Tensor:
    depth = 0
    while depth < 3 and float(x.detach().abs().mean()) < 0.1 * 2**depth:
        x, depth = 3 * torch.tanh(x @ p["w"]), depth + 1
    return squares(x @ p["out"][depth])


@sequel(
    lambda: [(normal(4, 5, 6), torch.tensor(n)) for n in ([5, 5, 5, 5], [5, 2, 4, 2], [4, 3, 1, 5], [5, 4, 4, 2])],
    plans=2,
    w=(6, 3),
    v=(3, 3),
)
def packed_by_other_lengths(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return packed_by_lengths(p, batch)


@sequel(lambda: [[normal(n, 6) for n in sizes] for sizes in ([4, 1, 5], [1, 4, 5], [2, 2, 2], [4, 1])], 2, w=(6, 3))
def other_ragged_rows(p: Params, parts: list[Tensor]) -> Tensor:
    h = torch.tanh(torch.cat(parts) @ p["w"])
    return squares(pad_sequence(h.split([len(part) for part in parts]), batch_first=True))


@sequel(lambda: [rows() for _ in range(4)], w=(6, 3), v=(3, 2))
def another_order_of_the_batch(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x @ p["w"])
    order = h.detach().sum(1).argsort()
    return squares(h[order] @ p["v"])[order.argsort()]


@sequel(lambda: [-rows().abs(), rows(), rows()], w=(6, 3))
def dead_at_first(p: Params, x: Tensor) -> Tensor:
    return squares(torch.relu((x @ p["w"].abs()).cumsum(1)))


@sequel(lambda: [(rows(), lam) for lam in (0.0, 0.5, 1.0)], plans=2, w=(6, 3), v=(3, 2))
def a_term_that_starts_at_zero(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    h = torch.tanh(batch[0] @ p["w"])
    return squares(h) + batch[1] * squares(h @ p["v"])


@sequel(lambda: [(graph()[0], graph()[1][:, torch.randperm(8)], graph()[2]) for _ in range(3)], w=(6, 3))
def other_edges(p: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    h, (source, target), owner = batch
    h = torch.tanh(h @ p["w"])
    h = torch.zeros_like(h).index_add(0, target, h[source])
    return squares(torch.zeros(3, 3, dtype=h.dtype).index_add(0, owner, h))


@sequel(with_rows(False, True, False, True), plans=2, w=(6, 3))
def statistics_by_a_flag(p: Params, batch: tuple[Tensor, bool]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(F.batch_norm(h, h.new_zeros(3), h.new_ones(3), training=batch[1]).sin())


@sequel(lambda: [(normal(8, 6), order) for order in (torch.arange(8), torch.randperm(8))], plans=2, w=(6, 3), v=(3, 2))
def paired_after_another_order(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    moved = torch.tanh(batch[0] @ p["w"])[batch[1]]
    return squares(torch.einsum("ndk,dp->npk", moved.unfold(0, 2, 2), p["v"]))


FIRST, LATER = [1.0, 1, 1, 0, 0, 0], [0.0, 1, 1, 1, 1, 1]


UNSEEN_ORDER = "which of the values an op takes is not in the checksum of the program"


@sequel(
    lambda: [(normal(6, 6), m) for m in (shares(FIRST, FIRST[::-1]), shares(LATER[::-1], [0] * 5 + [1]))],
    None,
    w=(6, 3),
)
def pooled_by_a_matrix_of_data(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return squares(batch[1] @ torch.tanh(batch[0] @ p["w"]))


@sequel(
    lambda: [(normal(6, 6), torch.tensor(s)) for s in ([0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1])],
    None,
    w=(6, 3),
)
def packed_segments_by_one_hot(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    each = torch.tanh(batch[0] @ p["w"]).square().sum(1)
    return F.one_hot(batch[1], 2).T.to(each.dtype) @ each


@sequel(with_rows(torch.ones(4, 1) > 0, torch.tensor([[1], [0], [0], [1]]) > 0), None, w=(6, 3))
def chosen_from_two_samples(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(torch.where(batch[1], h, h.flip(0)))


@sequel(with_rows(torch.eye(4) < 1, torch.zeros(4, 4) > 0), None, w=(6, 3))
def attention_over_the_batch_behind_a_mask(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares((h @ h.T).masked_fill(batch[1], -torch.inf).softmax(1) @ h)


@sequel(with_rows(0.0, 0.5), None, w=(6, 3))
def a_term_over_the_batch_that_starts_at_zero(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h) + batch[1] * (h - h.mean(0)).exp().sum(1)


@sequel(with_rows(shares([0.0])[0], shares([0.5])[0]), None, w=(6, 3))
def a_term_over_the_batch_weighted_by_a_tensor(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h) + batch[1] * (h - h.mean(0)).exp().sum(1)


@sequel(with_rows(shares([0.0])[0], shares([0.5])[0]), None, w=(6, 3))
def a_term_over_the_batch_weighted_in_place(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h + (h - h.mean(0)).sin().mul_(batch[1]))


@sequel(with_rows(torch.ones(4, 1) > 0, torch.tensor([[1], [0], [0], [1]]) > 0), None, w=(6, 3))
def a_term_over_the_batch_masked_in_place(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h + (h - h.mean(0)).sin().masked_fill_(batch[1], 0.0))


@sequel(with_rows(torch.ones(4) > 0, torch.tensor([1, 0, 0, 1]) > 0), None, w=(6, 3))
def a_term_over_the_batch_overwritten(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    term = (h - h.mean(0)).sin()
    term[batch[1]] = 0.0
    return squares(h + term)


@sequel(with_rows(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 1, 1])), None, w=(6, 3))
def a_term_over_the_batch_overwritten_by_number(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0] @ p["w"]
    term = (h - h.mean(0)).sin()
    term[batch[1]] = 0.0
    return squares(h + term)


@sequel(with_rows(-9.0, 9.0), None, w=(6, 3))
def a_term_over_the_batch_that_is_off_in_place(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    h = batch[0] @ p["w"]
    return squares(h + F.relu(h - h.mean(0) + batch[1], inplace=True))


@sequel(lambda: [5 * rows(), 0.02 * rows()], None, w=(6, 3))
def a_margin_that_nothing_is_within(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return squares(h) + torch.relu(0.1 - (h[:, None] - h).square().sum(-1)).sum(1)


@sequel(with_rows(torch.arange(4), torch.tensor([2, 0, 1, 1])), None, w=(6, 3))
def activations_as_a_table(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return squares(F.embedding(batch[1], batch[0] @ p["w"]))


@sequel(lambda: [(normal(6, 6), torch.tensor([0, n])) for n in (3, 1)], None, w=(6, 3))
def activations_in_bags(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return squares(F.embedding_bag(torch.arange(6), torch.tanh(batch[0] @ p["w"]), batch[1], mode="sum"))


@sequel(lambda: [torch.arange(4.0, dtype=torch.float64)[:, None].expand(4, 6), -rows()], None, w=(6, 3))
def largest_so_far(p: Params, x: Tensor) -> Tensor:
    return squares((x @ p["w"].abs()).cummax(0).values)


@sequel(
    with_rows(
        *(
            torch.stack([torch.eye(4)[o] * m, torch.eye(4) * (1 - m)], 1).double()
            for o, m in (([0, 1, 2, 3], torch.ones(4, 1)), ([3, 2, 1, 0], shares([1.0], [0.0], [1.0], [0.0])))
        )
    ),
    None,
    w=(6, 3),
    experts=(2, 3, 3),
)
def experts_by_a_dispatch_mask(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h, dispatch = batch[0] @ p["w"], batch[1]
    slots = torch.einsum("sec,sd->ecd", dispatch, h)
    return squares(torch.einsum("sec,ecd->sd", dispatch, torch.tanh(slots @ p["experts"])))


@sequel(with_rows((0, 1, 2, 3), (3, 1, 2, 0), (0, 0, 1, 1)), None, w=(6, 3))
def rows_ordered_by_python(p: Params, batch: tuple[Tensor, tuple[int, ...]]) -> Tensor:
    each = (batch[0] @ p["w"]).unbind(0)
    return squares(torch.stack([each[i] for i in batch[1]]))


@sequel(with_rows(0.0, 0.5), None, w=(6, 18), out=(6, 6))
def attention_whose_dropout_starts_at_zero(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    x, nothing = batch[0].view(2, 2, 6), torch.zeros(0)
    return squares(
        F.multi_head_attention_forward(
            *(x, x, x, 6, 2, p["w"].T, None, None, None, False, batch[1], p["out"], None),
            need_weights=bool(len(nothing)),
        )[0].transpose(0, 1)
    )


class Stopped(torch.autograd.Function):
    """The identity, for a number that is zero without a gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, number: float) -> Tensor:
        ctx.number = number
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.number if ctx.number else None, None


@sequel(with_rows(0.0, 0.5), plans=2, w=(6, 3), v=(6, 3))
def used_after_all(p: Params, batch: tuple[Tensor, float]) -> Tensor:
    return squares(Stopped.apply(batch[0] @ p["w"], batch[1]) + batch[0] @ p["v"])
