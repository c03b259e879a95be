"""Randomness, derivatives inside the losses, losses of several samples."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import funcghost as fg
from tests.models.awkward_cases import Case, Params, case, inputs, normal, row, rows, squares

# -- randomness ---------------------------------------------------------------------------------------


@row(w=(6, 6), logits=(6, 4), code=(4, 3))
def noise_of_many_kinds(p: Params, x: Tensor) -> Tensor:
    h = F.rrelu(F.alpha_dropout(x @ p["w"], 0.3, True), training=True)
    soft = F.gumbel_softmax(h @ p["logits"], hard=True)
    return squares(F.dropout1d(soft @ F.dropout(p["code"], 0.3)))


@row(encoder=(6, 4), decoder=(2, 6))
def variational_autoencoder(p: Params, x: Tensor) -> Tensor:
    mean, log_variance = (x @ p["encoder"]).chunk(2, -1)
    z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return squares(z @ p["decoder"] - x) + divergence.sum((1, 2))


@row(w=(6, 3), noise=(3,))
def noise_on_a_weight(p: Params, x: Tensor) -> Tensor:
    w = p["w"] + torch.randn_like(p["w"]) * p["noise"].exp()
    return squares(x @ w + torch.bernoulli(p["noise"].sigmoid()) * p["noise"])


@row(w=(6, 3), rates=(3,))
def samples_of_a_distribution(p: Params, x: Tensor) -> Tensor:
    normals = torch.distributions.Normal((x @ p["w"]), p["rates"].exp(), validate_args=False)
    gamma = torch.distributions.Gamma((x @ p["w"]).exp(), p["rates"].exp(), validate_args=False)
    return -normals.log_prob(normals.rsample().detach()).sum((1, 2)) + gamma.log_prob(x.new_ones(())).sum((1, 2))


# -- derivatives inside the losses --------------------------------------------------------------------


def small_net(p: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["w"]) @ p["v"]


def slope_of(values: Tensor, at: Tensor) -> Tensor:
    slope: Tensor = torch.autograd.grad(values.sum(), at, create_graph=True)[0]
    return slope


@row(w=(6, 3), v=(3,), batch=rows)
def gradient_penalty(p: Params, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    value = small_net(p, x)
    return value + (slope_of(value, x).norm(dim=1) - 1).square()


@row(w=(6, 3), v=(3,), batch=rows)
def gradient_penalty_by_torch_func(p: Params, x: Tensor) -> Tensor:
    slope = torch.func.grad(lambda x: small_net(p, x).sum())(x)
    return small_net(p, x) + (slope.norm(dim=1) - 1).square()


@row(w=(7, 3), v=(3,), u=(3, 3), batch=lambda: normal(4, 3, 3))
def forces_of_a_potential(p: Params, places: Tensor) -> Tensor:
    # Three atoms a sample, each with a message from the two others: their energy, and its slope in the places.
    at = places.flatten(0, 1).detach().requires_grad_()
    to, other = torch.tensor([(i, j) for i in range(12) for j in range(12) if i != j and i // 3 == j // 3]).T
    apart = at[to] - at[other]
    features = torch.cat([apart, apart.norm(dim=1, keepdim=True), at[other].square()], 1)
    atoms = torch.zeros(12, 3, dtype=at.dtype).index_add(0, to, torch.tanh(features @ p["w"]))
    energy = (torch.tanh(atoms @ p["u"]) @ p["v"]).unflatten(0, (4, 3)).sum(1)
    return energy.square() + squares(slope_of(energy, at).unflatten(0, (4, 3)) + 0.1)


@row(w=(6, 3), v=(3,), batch=rows)
def laplacian_by_slopes(p: Params, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    slope = slope_of(small_net(p, x), x)
    return (torch.stack([slope_of(slope[:, i], x)[:, i] for i in range(6)]).sum(0) - 1).square()


@row(w=(6, 3), batch=rows)
def jacobian_at_once(p: Params, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    units = torch.eye(3, dtype=x.dtype)[:, None].expand(3, 4, 3)
    [rows] = torch.autograd.grad(torch.tanh(x @ p["w"]), x, units, is_grads_batched=True, create_graph=True)
    return rows.square().sum((0, 2))


@row(w=(6, 3), v=(3,), batch=rows)
def slope_at_an_activation(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x @ p["w"])
    value = (h @ p["v"]).square()
    return (slope_of(value, h) * h.sin()).sum(1) + value


@row(w=(6, 3), v=(3,), batch=rows, forward_route=False)
def laplacian(p: Params, x: Tensor) -> Tensor:
    hessians = torch.func.vmap(torch.func.hessian(lambda x: small_net(p, x)))(x)
    return (hessians.diagonal(0, 1, 2).sum(1) - 1).square()


@row(w=(6, 3), v=(3,), batch=rows)
def inner_step_by_torch_func(p: Params, x: Tensor) -> Tensor:
    inner = torch.func.grad(lambda v: (x.flip(1) @ p["w"] @ v).square().mean())(p["v"])
    return (x @ p["w"] @ (p["v"] - 0.1 * inner)).square()


@row(w=(6, 3), v=(3,), rate=(), batch=rows)
def inner_steps(p: Params, x: Tensor) -> Tensor:
    # The inner loss is of all samples: each of them has a part in every other one's.
    own = {"w": p["w"], "v": p["v"]}
    for _ in range(2):
        found = torch.autograd.grad(small_net(own, x.flip(1)).square().mean(), [*own.values()], create_graph=True)
        own = {name: value - p["rate"] * slope for (name, value), slope in zip(own.items(), found, strict=True)}
    return small_net(own, x).square()


@row(w=(6, 3), v=(3,), outcome=fg.ConservationError, says="in a loop", remedy="inner_step_in_a_loop", batch=rows)
def inner_step_under_vmap(p: Params, x: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        inner = torch.func.grad(lambda v: (x.flip(0) @ p["w"] @ v).square())(p["v"])
        return (x @ p["w"] @ (p["v"] - 0.1 * inner)).square()

    return torch.func.vmap(one)(x)


@row(w=(6, 3), v=(3,), batch=rows)
def inner_step_in_a_loop(p: Params, x: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        [inner] = torch.autograd.grad((x.flip(0) @ p["w"] @ p["v"]).square(), p["v"], create_graph=True)
        return (x @ p["w"] @ (p["v"] - 0.1 * inner)).square()

    return torch.stack([one(row) for row in x])


@row(w=(6, 3), v=(3,), batch=rows)
def adversarial_input_through_parameters(p: Params, x: Tensor) -> Tensor:
    near = x.detach().requires_grad_()
    [slope] = torch.autograd.grad(small_net(p, near).square().sum(), near)
    return small_net(p, x + 0.1 * slope.sign()).square()


@row(w=(6, 3), v=(3,), batch=rows)
def adversarial_input(p: Params, x: Tensor) -> Tensor:
    near = x.detach().requires_grad_()
    [slope] = torch.autograd.grad(small_net({k: v.detach() for k, v in p.items()}, near).square().sum(), near)
    return small_net(p, x + 0.1 * slope.sign()).square()


@row(w=(6, 3), v=(3,), batch=rows)
def slope_along_by_jvp(p: Params, x: Tensor) -> Tensor:
    found: Any = torch.func.jvp(lambda x: small_net(p, x), (x,), (torch.ones_like(x),))
    total: Tensor = found[0] + found[1]
    return total.square()


@row(w=(6, 3), v=(3,), batch=rows)
def slope_along_by_duals(p: Params, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(small_net(p, forward_ad.make_dual(x, torch.ones_like(x))))
        return (found.primal + found.tangent).square()


@row(w=(6, 6), rate=())
def ode_by_runge_kutta(p: Params, x: Tensor) -> Tensor:
    def slope(h: Tensor) -> Tensor:
        return torch.tanh(h @ p["w"])

    step = p["rate"].sigmoid()
    for _ in range(2):
        k1 = slope(x)
        k2 = slope(x + step / 2 * k1)
        k3 = slope(x + step / 2 * k2)
        k4 = slope(x + step * k3)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return squares(x)


@row(w=(6, 6), b=(6,))
def fixed_point_with_a_last_step(p: Params, x: Tensor) -> Tensor:
    w = 0.5 * p["w"] / p["w"].norm()
    with torch.no_grad():
        h = x
        for _ in range(20):
            h = torch.tanh(h @ w + x + p["b"])
    return squares(torch.tanh(h @ w + x + p["b"]))


@row(members=(3, 6, 2))
def ensemble_by_vmap(p: Params, x: Tensor) -> Tensor:
    return squares(torch.func.vmap(lambda w: torch.tanh(x @ w), out_dims=1)(p["members"]))


@row(members=(3, 6, 2))
def ensemble_by_einsum(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tanh(torch.einsum("btd,mdp->bmtp", x, p["members"])))


# -- losses of several samples ------------------------------------------------------------------------


@row(w=(6, 3), scale=(), batch=rows)
def clip_symmetric(p: Params, x: Tensor) -> Tensor:
    one, other = F.normalize(x @ p["w"], dim=1), F.normalize(x.sin() @ p["w"], dim=1)
    scores, wanted = one @ other.T * p["scale"].exp(), torch.arange(len(x))
    ce = nn.CrossEntropyLoss(reduction="none")
    return (ce(scores, wanted) + ce(scores.T, wanted)) / 2


def hardest(distance: Tensor) -> Tensor:
    label = torch.tensor([0, 0, 1, 1])
    same = label[:, None] == label
    return torch.relu((distance * same).amax(1) - distance.masked_fill(same, torch.inf).amin(1) + 1)


@row(w=(6, 3), batch=rows)
def hardest_triplets_by_cdist(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return hardest(torch.cdist(h, h))


@row(w=(6, 3), batch=rows)
def hardest_triplets_by_norms(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return hardest((h[:, None] - h).norm(dim=-1))


@row(w=(6, 3), batch=rows)
def decorrelated_features(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    z = (h - h.mean(0)) / h.std(0)
    off = (z.T @ z / len(x) - torch.eye(3, dtype=x.dtype)).square().sum()
    return squares(z.sin()) + off


@row(w=(6, 3), batch=rows)
def best_of_the_batch(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return h.topk(4, 0).values.cumsum(0).square().sum(1) + h.max(0).values.sum()


@row(w=(6, 1), batch=rows)
def pairwise_ranking(p: Params, x: Tensor) -> Tensor:
    s = (x @ p["w"])[:, 0]
    return F.softplus(s[None, :] - s[:, None]).triu(1).sum(1) + s.square()


@row(w=(6, 3), batch=rows)
def one_loss_for_each_pair(p: Params, x: Tensor) -> Tensor:
    h, (i, j) = x @ p["w"], torch.triu_indices(len(x), len(x), 1)
    return F.cosine_embedding_loss(h[i], h[j].tanh(), torch.ones(6), reduction="none")


@row(w=(6, 3), v=(3, 2), batch=rows)
def mixed_features(p: Params, x: Tensor) -> Tensor:
    h, order, share = torch.tanh(x @ p["w"]), torch.randperm(len(x)), torch.rand(len(x), 1, dtype=x.dtype)
    return squares((share * h + (1 - share) * h[order]) @ p["v"])


@row(w=(6, 4), batch=rows)
def assignments_by_sinkhorn(p: Params, x: Tensor) -> Tensor:
    scores = x @ p["w"]
    q = scores.exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return -(q * scores.log_softmax(1)).sum(1)


@row(w=(6, 3), batch=rows)
def normalised_over_the_batch(p: Params, x: Tensor) -> Tensor:
    each = squares(x @ p["w"])
    return each / each.sum() + (each - each.median()).abs()


@row(w=(6, 3), batch=rows)
def a_weak_term_over_the_batch(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return squares(h) + 1e-6 * (h - h.mean(0)).exp().sum(1)


@row(w=(6, 3), bank=(3,), batch=rows)
def cumulated_over_the_batch(p: Params, x: Tensor) -> Tensor:
    return squares((x @ p["w"] + p["bank"]).cumsum(0)) + squares(
        (x @ p["w"]).logcumsumexp(0).diff(dim=0, prepend=x[:1, :3])
    )


@case
def two_critics() -> Case:
    with_gradient = nn.Sequential(nn.Linear(6, 3), nn.LeakyReLU(), nn.Linear(3, 1)).double()
    critic = dict(with_gradient.named_parameters())

    def losses(p: Params, x: Tensor) -> Tensor:
        fake = torch.tanh(x[:, 0] @ p["generator"])
        frozen = {k: v.detach() for k, v in p.items() if k != "generator"}
        fooled = F.softplus(-functional_call(with_gradient, frozen, (fake,)))
        own = {k: v for k, v in p.items() if k != "generator"}
        told = F.softplus(functional_call(with_gradient, own, (fake.detach(),)))
        return (fooled + told + F.softplus(-functional_call(with_gradient, own, (x[:, 1],))))[:, 0]

    return Case(losses, {"generator": normal(6, 6), **critic}, inputs())
