"""Other layouts, and kinds of models."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from tests.models.awkward_cases import Case, Params, case, graph, inputs, normal, row, rows, segments, squares, tokens
from tests.versions import GRID_SAMPLE_FORWARD

# -- other layouts ------------------------------------------------------------------------------------


@row(w=(6, 6), kernel=(3, 6, 2))
def convolution_on_token_major_rows(p: Params, x: Tensor) -> Tensor:
    b, t, d = x.shape
    tokens_first = x.transpose(0, 1).reshape(t * b, d) @ p["w"]
    signal = tokens_first.view(t, b, d).permute(1, 2, 0)
    return squares(F.conv1d(signal, p["kernel"]))


@row(w=(6, 6), v=(6, 2))
def heads_folded_into_the_batch(p: Params, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    heads = (x @ p["w"]).view(b, t, 2, 3).permute(0, 2, 1, 3).reshape(2 * b, t, 3)
    mixed = torch.bmm(torch.baddbmm(heads.new_zeros(1), heads, heads.mT).softmax(-1), heads)
    return squares(mixed.view(b, 2, t, 3).transpose(1, 2).reshape(b, t, 6) @ p["v"])


@row(w=(6, 3), b=(3, 1, 1))
def samples_on_the_last_axis(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(torch.einsum("btd,dp->ptb", x, p["w"]) + p["b"])
    return (h * p["b"]).square().sum((0, 1))


@case
def lstm_on_packed_sequences() -> Case:
    module = nn.LSTM(6, 3, batch_first=True).double()

    def losses(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        packed = pack_padded_sequence(*batch, batch_first=True, enforce_sorted=False)
        out, (last, _) = functional_call(module, p, (packed,))
        return squares(pad_packed_sequence(out, batch_first=True)[0]) + squares(last[0])

    return Case(losses, dict(module.named_parameters()), (inputs(), torch.tensor([5, 2, 4, 2])))


@row(w=(6, 3), v=(3, 3), batch=lambda: [normal(n, 6) for n in (3, 1, 4, 2)])
def ragged_rows(p: Params, parts: list[Tensor]) -> Tensor:
    h = torch.tanh(torch.cat(parts) @ p["w"])
    padded = pad_sequence(h.split([len(part) for part in parts]), batch_first=True)
    return squares(padded @ p["v"])


@row(w=(6, 3), batch=lambda: [normal(n, 6) for n in (3, 1, 4, 2)])
def one_sample_after_the_other(p: Params, parts: list[Tensor]) -> Tensor:
    return torch.stack([torch.tanh(part @ p["w"]).square().sum() for part in parts])


@row(
    w=(6, 3),
    v=(3, 3),
    batch=segments,
    forward_route=False,
)
def segments_reduced(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = torch.tanh(batch[0] @ p["w"])
    return squares(torch.segment_reduce(h, "mean", lengths=batch[1]) @ p["v"])


@row(w=(6, 3), v=(3, 3), batch=segments)
def segments_added(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    h, owner = torch.tanh(batch[0] @ p["w"]), torch.arange(4).repeat_interleave(batch[1])
    total = torch.zeros(4, 3, dtype=h.dtype).index_add(0, owner, h)
    return squares((total / batch[1].unsqueeze(1)) @ p["v"])


@row(table=(10, 6), head=(6, 10), batch=tokens)
def masked_tokens_only(p: Params, i: Tensor) -> Tensor:
    masked = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    logits = F.embedding(i, p["table"])[masked] @ p["head"]
    loss = F.cross_entropy(logits, i[masked], reduction="none")
    sample = masked.nonzero()[:, 0]
    return torch.zeros(4, dtype=loss.dtype).index_add(0, sample, loss) / masked.sum(1)


# -- kinds of models ----------------------------------------------------------------------------------


@row(message=(6, 6), update=(6, 6), batch=graph)
def graph_network(p: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    h, (source, target), owner = batch
    for _ in range(2):
        messages = torch.relu(h[source] @ p["message"])
        h = torch.tanh(torch.zeros_like(h).index_add(0, target, messages) + h @ p["update"])
    return squares(torch.zeros(3, 6, dtype=h.dtype).index_add(0, owner, h))


@row(w=(6, 6), batch=graph)
def graph_attention(p: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    h, (source, target), owner = batch
    h = h @ p["w"]
    score = (h[source] * h[target]).sum(1).exp()
    total = torch.zeros(7, dtype=h.dtype).scatter_add(0, target, score)
    h = torch.zeros_like(h).index_add(0, target, h[source] * (score / total[target]).unsqueeze(1))
    return torch.zeros(3, dtype=h.dtype).scatter_reduce(0, owner, h.square().sum(1), "sum")


@row(w=(6, 3), batch=lambda: (normal(4, 5, 6), torch.randint(0, 2, (5, 3)).double()))
def hypergraph(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, incidence = batch
    edges = torch.tanh(incidence.T @ (x @ p["w"]))
    return squares(incidence @ edges / (1 + incidence.sum(1, keepdim=True)))


@row(phi=(6, 4), rho=(4, 2))
def deep_sets(p: Params, x: Tensor) -> Tensor:
    h = torch.relu(x @ p["phi"])
    return squares(torch.cat([h.sum(1), h.amax(1), h.logsumexp(1)]).view(3, len(x), 4).sum(0) @ p["rho"])


@row(router=(6, 3), up=(3, 6, 4), down=(3, 4, 6))
def dense_mixture_of_experts(p: Params, x: Tensor) -> Tensor:
    gate = (x @ p["router"]).softmax(-1)
    h = torch.relu(torch.einsum("btd,edh->bteh", x, p["up"]))
    return squares(torch.einsum("bteh,ehd,bte->btd", h, p["down"], gate))


@row(router=(6, 3), experts=(3, 6, 6))
def experts_top_two(p: Params, x: Tensor) -> Tensor:
    h = x.flatten(0, 1)
    weights, chosen = (h @ p["router"]).softmax(-1).topk(2, -1)
    out = torch.zeros_like(h)
    for expert in range(3):
        where, rank = torch.where(chosen == expert)
        out = out.index_add(0, where, (h[where] @ p["experts"][expert]).tanh() * weights[where, rank, None])
    return squares(out.view_as(x)) + (weights.view(len(x), -1).sum(1) - 1).square()


@row(w=(6, 3), means=(3, 4), scales=(3, 4))
def mixture_density(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x[:, :, :] @ p["w"])
    share, mean, deviation = h @ p["means"], h @ p["scales"], (h @ p["means"]).exp()
    log = share.log_softmax(-1) - 0.5 * ((x[..., :1] - mean) / deviation).square() - deviation.log()
    return -log.logsumexp(-1).sum(1)


@row(qkv=(6, 18), bias=(2, 9), slopes=(2,))
def attention_with_biases(p: Params, x: Tensor) -> Tensor:
    b, t = x.shape[:2]
    q, k, v = (part.view(b, t, 2, 3).transpose(1, 2) for part in (x @ p["qkv"]).chunk(3, -1))
    offset = torch.arange(t)[:, None] - torch.arange(t)
    relative = p["bias"][:, offset + t - 1] - p["slopes"].exp()[:, None, None] * offset.abs()
    causal = torch.where(offset < 0, -torch.inf, 0.0).to(x.dtype)
    return squares(F.scaled_dot_product_attention(q, k, v, attn_mask=relative + causal))


@row(qk=(6, 12), frequency=(3,))
def rotary_attention(p: Params, x: Tensor) -> Tensor:
    angle = torch.arange(5, dtype=x.dtype)[:, None] * p["frequency"].exp()
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def turned(h: Tensor) -> Tensor:
        return h * cos + torch.cat([-h[..., 3:], h[..., :3]], -1) * sin

    q, k = (x @ p["qk"]).chunk(2, -1)
    return squares((turned(q) @ turned(k).mT / math.sqrt(6)).softmax(-1) @ x)


@row(qkv=(6, 9), decay=(3,))
def linear_attention(p: Params, x: Tensor) -> Tensor:
    q, k, v = (x @ p["qkv"]).chunk(3, -1)
    state = (F.elu(k) + 1).unsqueeze(-1) * v.unsqueeze(-2) * p["decay"].sigmoid()[:, None]
    return squares(torch.einsum("btd,btdp->btp", F.elu(q) + 1, state.cumsum(1)))


@row(project=(6, 6), step=(6,), a=(6, 2), bc=(6, 4), skip=(6,), kernel=(6, 1, 2))
def selective_state_space(p: Params, x: Tensor) -> Tensor:
    u = F.silu(F.conv1d((x @ p["project"]).mT, p["kernel"], padding=1, groups=6)[..., :-1].mT)
    delta, (b, c) = F.softplus(u * p["step"]), (u @ p["bc"]).chunk(2, -1)
    h, out = u.new_zeros(len(u), 6, 2), []
    for t in range(u.shape[1]):
        h = torch.exp(-delta[:, t, :, None] * p["a"].exp()) * h
        h = h + delta[:, t, :, None] * b[:, t, None] * u[:, t, :, None]
        out.append((h * c[:, t, None]).sum(-1) + p["skip"] * u[:, t])
    return squares(torch.stack(out, 1))


@row(shift=(3, 3), scale=(3, 3), mix=(6, 6))
def normalising_flow(p: Params, x: Tensor) -> Tensor:
    log_det = x.new_zeros(len(x))
    for _ in range(2):
        left, right = x.chunk(2, -1)
        log_scale = torch.tanh(left @ p["scale"])
        x = torch.cat([left, right * log_scale.exp() + left @ p["shift"]], -1) @ p["mix"]
        log_det = log_det + log_scale.sum((1, 2)) + x.shape[1] * torch.linalg.slogdet(p["mix"]).logabsdet
    return 0.5 * squares(x) - log_det


@row(w=(3, 6, 4))
def capsules_routed_by_agreement(p: Params, x: Tensor) -> Tensor:
    votes, logits = torch.einsum("btd,kdp->btkp", x, p["w"]), x.new_zeros(4, 5, 3)
    for _ in range(3):
        out = (logits.softmax(-1).unsqueeze(-1) * votes).sum(1)
        out = out * out.norm(dim=-1, keepdim=True) / (1 + out.square().sum(-1, keepdim=True))
        logits = logits + (votes * out[:, None]).sum(-1)
    return out.norm(dim=-1).sum(1)


@row(frequencies=(6, 4), w=(8, 2))
def learned_fourier_features(p: Params, x: Tensor) -> Tensor:
    angle = 2 * math.pi * x @ p["frequencies"]
    return squares(torch.cat([angle.sin(), angle.cos()], -1) @ p["w"])


@row(
    theta=(2, 3),
    kernel=(4, 2, 3, 3),
    batch=lambda: normal(4, 2, 6, 6),
    forward_route=GRID_SAMPLE_FORWARD,
)
def spatial_transformer(p: Params, x: Tensor) -> Tensor:
    grid = F.affine_grid(p["theta"].expand(len(x), 2, 3), list(x.shape), align_corners=False)
    h = F.pixel_shuffle(F.conv2d(F.grid_sample(x, grid, align_corners=False), p["kernel"], padding=1), 2)
    return squares(F.interpolate(h, scale_factor=0.5, mode="bilinear"))


@row(w=(3, 18), bias=(3,), batch=lambda: normal(4, 2, 6, 6))
def convolution_by_unfolding(p: Params, x: Tensor) -> Tensor:
    patches = p["w"] @ F.unfold(x, 3, padding=1) + p["bias"][:, None]
    return squares(F.fold(patches.repeat(1, 4, 1), (7, 7), 2)) + squares(
        x.unfold(2, 2, 2)[:, 0, ..., 0] @ p["w"][:, :6].T
    )


@row(w=(6, 6), batch=lambda: (normal(4, 5, 6), torch.tensor([[1, 2], [3, 3], [5, 1], [2, 4]])), forward_route=False)
def connectionist_temporal(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, targets = batch
    log = (x @ p["w"]).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log, targets, torch.tensor([5, 5, 4, 5]), torch.tensor([2, 2, 1, 2]), reduction="none")


@row(emission=(6, 3), transition=(3, 3))
def forward_algorithm_with_forbidden_steps(p: Params, x: Tensor) -> Tensor:
    allowed = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0], [-torch.inf, 0.0, 0.0]], dtype=x.dtype)
    scores, steps = x @ p["emission"], p["transition"] + allowed
    alpha = scores[:, 0]
    for t in range(1, 5):
        alpha = (alpha.unsqueeze(2) + steps).logsumexp(1) + scores[:, t]
    return alpha.logsumexp(1)


@row(w=(6, 3))
def quantiles_and_soft_counts(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    bins = torch.linspace(-2, 2, 4, dtype=x.dtype)
    counts = torch.exp(-(h.unsqueeze(-1) - bins).square()).sum((1, 2))
    off = h[..., 0] - 0.3
    return torch.maximum(0.9 * off, -0.1 * off).sum(1) + squares(counts) + h.flatten(1).quantile(0.25, 1)


@row(w=(6, 4), temperature=())
def distillation_and_focal(p: Params, x: Tensor) -> Tensor:
    logits = (x @ p["w"]) / p["temperature"].exp()
    told = F.kl_div(logits.log_softmax(-1), x[..., :4].softmax(-1), reduction="none").sum((1, 2))
    ce = F.cross_entropy(logits.mT, torch.zeros(4, 5, dtype=torch.long), label_smoothing=0.1, reduction="none")
    return told + ((1 - torch.exp(-ce)).square() * ce).sum(1)


@row(w=(6, 3), batch=rows)
def product_with_sparse_data(p: Params, x: Tensor) -> Tensor:
    return squares(torch.sparse.mm((x * (x > 0)).to_sparse(), p["w"]))


@row(w=(6, 3), tolerance=1e-10, batch=lambda: normal(1, 5, 6))
def one_sample(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tanh(x @ p["w"]).cumsum(1))


@row(w=(6, 3), g=(3,), batch=lambda: normal(1, 5, 6))
def one_sample_with_batch_statistics(p: Params, x: Tensor) -> Tensor:
    h = F.batch_norm((x @ p["w"]).flatten(0, 1), None, None, p["g"], training=True)
    return squares(h.sin().view(1, 5, 3))
