"""A symmetric matrix over all parameters as a product with directions, and the pullbacks that make it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from funcghost.attribution.batches import check_batches, stacked
from funcghost.errors import InputError
from funcghost.ops.tangent import differentiable_kernels
from funcghost.trees import Params, Tree, split_params

Leaves = Sequence[Tensor]
Linear = Callable[[Leaves], list[Tensor]]
"""From directions [k, *shape] to their products, summed over the samples of a batch."""


@dataclass(frozen=True, eq=False)
class Product:
    """`product(direction)`: a symmetric matrix over all parameters, times one direction or each of a stack.

    `parts` makes, for every batch, a linear function and the number of its samples; `held` are those that are kept.
    """

    params: Params
    parts: Callable[[], Iterator[tuple[Linear, int]]]

    def __call__(self, direction: Tree) -> Tree:
        """The product with a tree like params, or with leaves [k, *shape]."""
        leaves, many = stacked(direction, self.params)
        found = self.of_leaves(leaves)
        return self.params.rebuild(found if many is not None else [leaf.squeeze(0) for leaf in found])

    def of_leaves(self, leaves: Leaves) -> list[Tensor]:
        """The products with k directions, [k, *shape]."""
        total, count = list[Tensor](), 0
        for linear, samples in self.parts():
            found = linear(leaves)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
            count += samples
        if not count:
            raise InputError("matrix_free: the batches have no samples.")
        return [leaf / count for leaf in total]


def summed_product(
    linear: Callable[[Params, Tree], tuple[Linear, int]], params: Tree, batches: Iterable[Tree], hold: bool
) -> Product:
    """The mean over the samples of all batches of what `linear` makes of each; its graphs kept with `hold`."""
    split, batches = split_params(params), check_batches("matrix_free: batches", batches)
    held: list[tuple[Linear, int]] = []

    def parts() -> Iterator[tuple[Linear, int]]:
        if held:
            yield from held
            return
        for batch in batches:
            with torch.enable_grad(), differentiable_kernels():
                made = linear(split, batch)
                if hold:
                    held.append(made)
                yield made

    return Product(split, parts)


def grads(output: Tensor, leaves: Leaves, dual: Tensor | None, create_graph: bool) -> list[Tensor]:
    """The derivative of an output in the leaves, zeros where it does not depend on one."""
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(
        torch.autograd.grad(output, leaves, dual, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    )


def pullback(outputs: Leaves, inputs: Leaves, cotangents: Leaves) -> list[Tensor]:
    """Of k cotangents, [k, *shape] each."""
    k = len(cotangents[0])
    pairs = [(out, u) for out, u in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return [leaf.new_zeros((k, *leaf.shape)) for leaf in inputs]
    outs, rows = [out for out, _ in pairs], [u for _, u in pairs]
    if k == 1:
        found = torch.autograd.grad(outs, inputs, [u[0] for u in rows], retain_graph=True, allow_unused=True)
    else:
        found = torch.autograd.grad(outs, inputs, rows, retain_graph=True, allow_unused=True, is_grads_batched=True)
    return [
        leaf.new_zeros((k, *leaf.shape)) if g is None else g.detach().reshape(k, *leaf.shape)
        for g, leaf in zip(found, inputs, strict=True)
    ]
