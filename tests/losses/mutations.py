"""What the tests of this wing must notice."""

from tests.mutation import Mutation

EXAMPLE = "tests/losses/test_per_example.py"
HEAD = "tests/losses/test_functional.py"

MUTATIONS: dict[str, Mutation] = {
    "first derivatives once for all": Mutation(
        "losses/head.py",
        "if kept and not torch.is_grad_enabled():",
        "if kept:",
        (HEAD, "-k", "hessians or second_order"),
    ),
    "a softmax without curvature": Mutation(
        "losses/chunks.py", "(q - (p * q).sum(1, keepdim=True))", "q", (HEAD, "-k", "hessians or second_order")
    ),
    "heads in place of examples": Mutation(
        "losses/batching.py",
        "if axis is None else operand.movedim(axis, 0)",
        "if axis is None else operand",
        (EXAMPLE,),
    ),
    "every chunk is the first": Mutation(
        "losses/examples.py", "leaf.narrow(axis, start, count)", "leaf.narrow(axis, 0, count)", (EXAMPLE, "-k", "chunk")
    ),
}
