"""What the tests of this wing must notice."""

from tests.mutation import Mutation

EXAMPLE = "tests/losses/test_per_example.py"
HEAD = "tests/losses/test_functional.py"

MUTATIONS: dict[str, Mutation] = {
    "first derivatives once for all": Mutation(
        "losses/head.py",
        "Losses.backward",
        "kept and not torch.is_grad_enabled()",
        "kept",
        (HEAD, "-k", "hessians or second_order"),
    ),
    "a softmax without curvature": Mutation(
        "losses/chunks.py",
        "curvature",
        "u[rows].unsqueeze(1) * p * (q - (p * q).sum(1, keepdim=True))",
        "u[rows].unsqueeze(1) * p * q",
        (HEAD, "-k", "hessians or second_order"),
    ),
    "heads in place of examples": Mutation(
        "losses/batching.py",
        "_aligned",
        "operand.unsqueeze(0) if axis is None else operand.movedim(axis, 0)",
        "operand.unsqueeze(0) if axis is None else operand",
        (EXAMPLE,),
    ),
    "every chunk is the first": Mutation(
        "losses/examples.py",
        "per_example.losses.of_chunk",
        "leaf.narrow(axis, start, count)",
        "leaf.narrow(axis, 0, count)",
        (EXAMPLE, "-k", "chunk"),
    ),
}
