"""Parameters in disguise, and how often, when and where they are used."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from tests.models.awkward_cases import Params, normal, row, squares, tokens

# -- parameters in disguise: views, products, decompositions of them ---------------------------------


@row(flat=(6 * 3 + 3,))
def slices_of_one_flat_parameter(p: Params, x: Tensor) -> Tensor:
    return squares(F.linear(x, p["flat"][:18].view(3, 6), p["flat"].narrow(0, 18, 3)))


@row(w=(6, 6))
def views_of_views(p: Params, x: Tensor) -> Tensor:
    w = p["w"].T.reshape(2, 3, 6).transpose(0, 2).flatten(1).unflatten(1, (2, 3))[:, 1]
    return squares(x @ w) + squares(x[..., :3] @ p["w"].as_strided((3, 2), (1, 6), 4))


@row(a=(3, 6), b=(2, 6), c=(6,))
def one_vector_of_all_parameters(p: Params, x: Tensor) -> Tensor:
    flat = nn.utils.parameters_to_vector([p["a"], p["b"], p["c"]])
    return squares(F.linear(x, flat[:30].view(5, 6), flat[31:]))


@row(w=(6, 3))
def cast_and_back(p: Params, x: Tensor) -> Tensor:
    return squares(x @ p["w"].to(torch.complex128).real.to(torch.float64))


@row(scale=(), shift=(1,), empty=(0, 6))
def scalars_and_an_empty_parameter(p: Params, x: Tensor) -> Tensor:
    both = torch.cat([x, (x[:, :0] @ p["empty"].T @ p["empty"])], 1)
    return squares(both * p["scale"].exp().expand(6) + p["shift"].expand_as(both))


@row(w=(6, 3), mask=lambda: (normal(6, 3) > 0).double())
def pruned_by_an_ordinary_tensor(p: Params, x: Tensor) -> Tensor:
    kept = p["w"].detach().abs() > 0.3
    return squares(x @ p["w"].masked_fill(~kept, 0.0)) + squares(x @ torch.where(kept, p["w"], p["mask"]))


@row(w=(6, 3))
def only_the_kept_entries(p: Params, x: Tensor) -> Tensor:
    kept = torch.arange(18).view(6, 3) % 3 > 0
    w = torch.zeros(6, 3, dtype=x.dtype).masked_scatter(kept, p["w"][kept])
    return squares(x @ w)


@row(w=(6, 3), s=(3,))
def reparametrised_by_functions(p: Params, x: Tensor) -> Tensor:
    w = p["w"].softmax(0) + p["w"].clamp(-0.5, 0.5) + p["w"].tril().abs()
    return squares(x @ w * F.softplus(p["s"]))


@row(a=(6, 2), b=(2, 3))
def outer_product_weight(p: Params, x: Tensor) -> Tensor:
    return squares(x @ (p["a"] @ p["b"]) + x @ torch.outer(p["a"][:, 0], p["b"][1]))


@row(a=(2, 3), b=(3, 1))
def kronecker_weight(p: Params, x: Tensor) -> Tensor:
    return squares(x @ torch.kron(p["a"], p["b"]).reshape(6, 3))


@row(a=(2, 3), b=(4, 2), d=(5,))
def blocks_and_diagonals(p: Params, x: Tensor) -> Tensor:
    w = torch.block_diag(p["a"], p["b"])  # [6, 5]
    return squares(x @ w @ torch.diag(p["d"])) + squares(x @ torch.diag_embed(torch.cat([p["d"], p["d"][:1]])))


@row(a=(6, 2), b=(2, 3), scale=())
def lora_by_hand(p: Params, x: Tensor) -> Tensor:
    base = torch.linspace(-1, 1, 18, dtype=x.dtype).view(6, 3)
    return squares(x @ base + (x @ p["a"]) @ p["b"] * p["scale"] + x @ (base + p["a"] @ p["b"]))


@row(up=(6, 8), kernel=(8, 4 * 5 * 3), bias=(4,))
def convolution_from_another_net(p: Params, x: Tensor) -> Tensor:
    kernel = torch.tanh(torch.linspace(-1, 1, 6, dtype=x.dtype) @ p["up"]) @ p["kernel"]
    return squares(F.conv1d(x, kernel.view(4, 5, 3), p["bias"]))


@row(style=(6, 5), kernel=(4, 5, 3))
def a_kernel_for_each_sample(p: Params, x: Tensor) -> Tensor:
    # Samples are folded into the channels of one image, as groups.
    kernels = p["kernel"] * torch.sigmoid(x[:, 0] @ p["style"])[:, None, :, None]
    kernels = kernels * (kernels.square().sum((2, 3), keepdim=True) + 1e-3).rsqrt()
    out = F.conv1d(x.reshape(1, -1, 6), kernels.flatten(0, 1), groups=len(x))
    return squares(out.view(len(x), 4, -1))


@row(generator=(6, 18))
def weights_made_of_the_sample(p: Params, x: Tensor) -> Tensor:
    weights = (x.mean(1) @ p["generator"]).view(-1, 6, 3)
    return squares(torch.bmm(x, weights))


@row(w=(6, 3))
def weights_standardised(p: Params, x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(p["w"], 0)
    return squares(x @ ((p["w"] - mean) / deviation))


@row(w=(6, 6))
def solved_and_inverted(p: Params, x: Tensor) -> Tensor:
    w = p["w"] + 3 * torch.eye(6, dtype=x.dtype)
    return squares(torch.linalg.solve(w, x.mT)) + squares(x @ torch.linalg.inv(w))


@row(w=(6, 6))
def symmetric_decompositions(p: Params, x: Tensor) -> Tensor:
    positive = p["w"] @ p["w"].T + torch.eye(6, dtype=x.dtype)
    lower, values = torch.linalg.cholesky(positive), torch.linalg.eigvalsh(positive)
    return squares(x @ lower) + squares(x @ torch.linalg.eigh(positive).eigenvectors.abs()) * values.log().sum()


@row(w=(6, 3))
def singular_values(p: Params, x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(p["w"], full_matrices=False)
    return squares(x @ (u * s.sqrt()) @ vh) + torch.linalg.matrix_norm(p["w"], 2)


@row(w=(6, 6))
def exponential_of_a_skew_matrix(p: Params, x: Tensor) -> Tensor:
    return (x @ torch.matrix_exp(p["w"] - p["w"].T)).tanh().sum((1, 2)) + torch.linalg.slogdet(p["w"]).logabsdet


@row(w=(6, 3))
def einsum_with_odd_letters(p: Params, x: Tensor) -> Tensor:
    a = torch.einsum("zQ,bAz->QbA", p["w"], x).movedim(0, 2)
    b = torch.einsum("...d,dp", x, p["w"])
    c = torch.einsum("btd,dp,btd->bp", x, p["w"], x.cos())
    return squares(a * b) + squares(torch.einsum("bii->b", torch.einsum("bp,pd->bpd", c, p["w"].T)[:, :, :3])[:, None])


@row(w=(6, 2, 5))
def tensordot_over_two_axes(p: Params, x: Tensor) -> Tensor:
    return squares(torch.tensordot(x, p["w"], dims=([2, 1], [0, 2]))) + squares(
        torch.tensordot(p["w"][..., 0].T, x.permute(2, 0, 1), 1)[0]
    )


@row(w=(6, 3), b=(3,))
def expanded_over_the_batch(p: Params, x: Tensor) -> Tensor:
    weights = p["w"].expand(len(x), 6, 3)
    return squares(torch.baddbmm(p["b"].expand(len(x), 5, 3), x, weights)) + squares(torch.bmm(x, weights.clone()))


@row(table=(7, 3))
def a_parameter_indexed_by_data(p: Params, x: Tensor) -> Tensor:
    index = (x.sum(-1).abs() * 3).long() % 7
    first, second = p["table"][index], p["table"].index_select(0, index[:, 0])
    return squares(first) + squares(second.sin() * p["table"].gather(0, index[:, :3]))


@row(memory=(3, 6), key=(6, 3))
def written_into_a_memory_for_each_sample(p: Params, x: Tensor) -> Tensor:
    memory = p["memory"].repeat(len(x), 1, 1)
    for t in range(x.shape[1]):
        address = (x[:, t] @ p["key"]).softmax(-1)
        memory = memory * (1 - 0.5 * address.unsqueeze(-1)) + address.unsqueeze(-1) * x[:, t, None]
    return squares(memory)


@row(target=(4, 3, 6), w=(6, 6))
def added_into_a_parameter(p: Params, x: Tensor) -> Tensor:
    index = torch.tensor([0, 2, 1, 0, 2])
    return squares(p["target"].index_add(1, index, x @ p["w"]))


@row(target=(4, 5, 6), start=(4, 6))
def a_parameter_for_each_sample(p: Params, x: Tensor) -> Tensor:
    # The derivative of these sums is the direction itself, which must not be written to.
    h = torch.addcmul(p["target"], x, x.cos()).sin() + torch.lerp(x, p["target"], 0.5)
    return squares(h + torch.rsub(x, p["target"])) + (x[:, 0].clone().addcmul_(p["start"], x[:, 1])).tanh().sum(1)


@row(value=(3,), w=(6, 6))
def put_into_an_activation(p: Params, x: Tensor) -> Tensor:
    where = torch.tensor([0, 2, 4]), torch.tensor([5, 1, 3])
    h = (x @ p["w"]).mT.index_put((torch.tensor([1]),), x.new_ones(()))
    return squares(h.mT.clone().index_put((torch.arange(4)[:, None], *where), p["value"], accumulate=True))


@row(w=(3,))
def scattered_onto_each_sample(p: Params, x: Tensor) -> Tensor:
    index = torch.tensor([[0, 2, 4]]).expand(len(x), 3)
    return squares(x.sum(-1).scatter_add(1, index, p["w"].expand(len(x), 3)))


@row(table=(10, 6), batch=tokens)
def embedding_that_is_the_head_and_a_mean(p: Params, i: Tensor) -> Tensor:
    h = F.embedding(i, p["table"] - p["table"].mean(0))
    return F.cross_entropy(F.linear(h, p["table"]).mT, i, reduction="none").mean(1)


@row(first=(5, 6), second=(5, 6), batch=tokens)
def hashed_embedding(p: Params, i: Tensor) -> Tensor:
    return squares(F.embedding(i * 7 % 5, p["first"]) * F.embedding(i * 3 % 5, p["second"]).sigmoid())


@row(w=(6, 3))
def straight_through_binary_weights(p: Params, x: Tensor) -> Tensor:
    return squares(x @ (p["w"] + (p["w"].sign() - p["w"]).detach()))


@row(filter=(5, 3), w=(6, 3))
def long_convolution_by_fft(p: Params, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x @ p["w"], n=10, dim=1) * torch.fft.rfft(p["filter"], n=10, dim=0)
    return squares(torch.fft.irfft(spectrum, n=10, dim=1)[:, :5])


@row(w=(6, 6), real=(3,), imaginary=(3,))
def rotated_as_complex_numbers(p: Params, x: Tensor) -> Tensor:
    turn = torch.polar(p["real"].exp(), p["imaginary"])
    pairs = torch.view_as_complex((x @ p["w"]).unflatten(-1, (3, 2)).contiguous())
    return squares(torch.view_as_real(pairs * turn).flatten(2)) + (pairs * turn.conj()).angle().cos().sum((1, 2))


@row(
    w=lambda: torch.view_as_complex(normal(6, 3, 2)),
    outcome=fg.InputError,
    says="real floating-point dtype",
    remedy="complex_spectrum_of_real_parts",
)
def complex_parameter(p: Params, x: Tensor) -> Tensor:
    return squares((x.to(p["w"].dtype) @ p["w"]).abs())


@row(w=(6, 3, 2))
def complex_spectrum_of_real_parts(p: Params, x: Tensor) -> Tensor:
    return squares((x.to(torch.complex128) @ torch.view_as_complex(p["w"])).abs())


@row(
    w=(6, 3),
    steps=lambda: torch.tensor(3),
    outcome=fg.InputError,
    says="close over the others",
    remedy="integer_closed_over",
)
def integer_parameter(p: Params, x: Tensor) -> Tensor:
    return squares(x @ p["w"]) * p["steps"]


@row(w=(6, 3))
def integer_closed_over(p: Params, x: Tensor) -> Tensor:
    return squares(x @ p["w"]) * torch.tensor(3)


@row(w=(6, 3), low=lambda: normal(3, 2).bfloat16(), bias=lambda: normal(2).float(), tolerance=2e-2)
def parameters_of_three_precisions(p: Params, x: Tensor) -> Tensor:
    h = (x @ p["w"]).bfloat16() @ p["low"]
    return squares(h.float() + p["bias"]).double()


# -- how often, when and where a parameter is used ----------------------------------------------------


@row(w=(6, 6))
def shared_over_time_and_depth(p: Params, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        for _ in range(2):
            h = torch.tanh(h @ p["w"] + x[:, t] @ p["w"].T)
    return squares(h)


@row(w=(6, 6), b=(6,))
def until_it_settles(p: Params, x: Tensor) -> Tensor:
    w = 0.5 * p["w"] / torch.linalg.matrix_norm(p["w"], 2)
    h, step = x, x
    while float(step.detach().abs().max()) > 0.05:
        step, h = h, torch.tanh(h @ w + x + p["b"])
        step = h - step
    return squares(h)


@row(w=(6, 6), out=(4, 6, 2))
def early_exit(p: Params, x: Tensor) -> Tensor:
    depth = 0
    while depth < 3 and float(x.detach().abs().mean()) < 0.6:
        x, depth = torch.tanh(x @ p["w"]), depth + 1
    return squares(x @ p["out"][depth])


@row(leaf=(6, 3), join=(6, 3), gate=(3,))
def recursion_over_a_tree(p: Params, x: Tensor) -> Tensor:
    def join(nodes: Tensor) -> Tensor:
        if nodes.shape[1] == 1:
            return torch.tanh(nodes[:, 0] @ p["leaf"])
        middle = (nodes.shape[1] + 1) // 2
        both = torch.cat([join(nodes[:, :middle]), join(nodes[:, middle:])], -1)
        return torch.tanh(both @ p["join"]) * p["gate"]

    return squares(join(x))


@row(w=(6, 3), b=(3,), batch=lambda: [normal(4, n, 6) for n in (1, 3, 2, 3)])
def called_again_with_other_sizes(p: Params, parts: list[Tensor]) -> Tensor:
    return squares(torch.cat([F.linear(part, p["w"].T, p["b"]).tanh() for part in parts], 1))


@row(w=(6, 3), never=(2,))
def some_samples_do_not_use_it(p: Params, x: Tensor) -> Tensor:
    used = x.sum((1, 2)) > 0
    return torch.where(used, squares(x @ p["w"]), x.new_ones(()))


@row(w=(6, 3), v=(3, 2))
def zero_gradients_for_some_samples(p: Params, x: Tensor) -> Tensor:
    live = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=x.dtype)
    return squares(torch.relu(x @ p["w"]) @ p["v"] * live[:, None, None])


@row(w=(6, 3), v=(3, 2))
def zero_gradients_for_all(p: Params, x: Tensor) -> Tensor:
    return squares(torch.relu(-(x @ p["w"]).square() - 1) @ p["v"])


@row(w=(6, 3), s=(4,))
def uncertainty_weights_and_a_penalty(p: Params, x: Tensor) -> Tensor:
    return squares(x @ p["w"]) * torch.exp(-p["s"]) + p["s"] + p["w"].abs().sum() + p["w"].norm()


@row(w=(6, 3))
def detached_in_place(p: Params, x: Tensor) -> Tensor:
    frozen = p["w"].sin()
    h = x @ frozen
    return squares(h + x @ frozen.detach_() * p["w"].sum())


@row(w=(6, 3))
def branch_on_a_parameter(p: Params, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return squares(h if float(p["w"].detach().sum()) > 0 else h.sin()) * p["w"].detach().max().item()


@row(w=(6, 3), cls=(1, 1, 6), position=(6, 6))
def a_learned_token_in_front(p: Params, x: Tensor) -> Tensor:
    h = torch.cat([p["cls"].expand(len(x), -1, -1), x], 1) + p["position"]
    return squares(torch.softmax(h @ h.mT, -1)[:, :1] @ h @ p["w"])


@row(student=(6, 3), v=(3, 2))
def ema_teacher(p: Params, x: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = 0.9 * p["student"].flip(0) + 0.1 * p["student"]
        wanted = (x @ teacher @ p["v"]).softmax(-1)
    return -(wanted * (x @ p["student"] @ p["v"]).log_softmax(-1)).sum((1, 2))


@row(w=(6, 3), table=(4, 3), forward_route=False)
def stop_gradient_codebook(p: Params, x: Tensor) -> Tensor:
    # Forward mode would need the derivative of the distances, which torch has not; the backward never comes there.
    z = torch.tanh(x @ p["w"])
    nearest = torch.cdist(z, p["table"]).argmin(-1)
    code = F.embedding(nearest, p["table"])
    passed = z + (code - z).detach()
    return squares(passed.sin()) + squares(z.detach() - code) + 0.25 * squares(z - code.detach())


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.3 * gradient


@row(features=(6, 3), label=(3, 2), domain=(3, 2), forward_route=False)
def gradient_reversal(p: Params, x: Tensor) -> Tensor:
    # Forward mode looks through: only the function's backward knows of the reversal.
    h = torch.tanh(x @ p["features"])
    reversed_features: Tensor = Reverse.apply(h)
    return squares(h @ p["label"]) + squares(reversed_features @ p["domain"])


@row(w=(6, 3), start=(3,))
def scheduled_sampling(p: Params, x: Tensor) -> Tensor:
    h = p["start"].expand(len(x), 3)
    for t in range(x.shape[1]):
        fed = torch.where(torch.rand(len(x), 1) < 0.5, x[:, t, :3], h)
        h = torch.tanh(torch.cat([fed, x[:, t, 3:]], 1) @ p["w"])
    return squares(h)
