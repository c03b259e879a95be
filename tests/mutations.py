"""What the tests of this wing must notice."""

from tests.mutation import Mutation

AWKWARD = "tests/engine/test_awkward.py"
HEAD = "tests/losses/test_functional.py"
MODES = "tests/engine/test_modes.py"
UNSEEN = "tests/engine/test_unseen.py"
VERIFY = "tests/laws/test_conservation.py"

MUTATIONS: dict[str, Mutation] = {
    "leaves of our own": Mutation("problem.py", "leaf if is_own(leaf) else", "leaf if False else", (UNSEEN,)),
    "ignored tokens have a loss": Mutation(
        "functional.py",
        "losses = torch.where(valid, losses.reshape(targets.shape), 0)",
        "losses = losses.reshape(targets.shape)",
        (HEAD, "-k", "values_and_gradients"),
    ),
    "ignored tokens are counted": Mutation(
        "functional.py",
        "losses / valid.sum(axes)",
        "losses / torch.ones_like(valid).sum(axes)",
        (HEAD, "-k", "reductions"),
    ),
    "memory is not put back": Mutation(
        "side_effects.py", "memory.copy_(copy)", "memory.copy_(memory)", (MODES, AWKWARD, "-k", "buffers or bank")
    ),
    "calls of a mode's own": Mutation(
        "side_effects.py", "with torch._C.DisableTorchFunction():", "if True:", (VERIFY,)
    ),
}
