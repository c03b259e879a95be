"""What the tests of this wing must notice."""

from tests.mutation import Mutation

AWKWARD = "tests/engine/test_awkward.py"
HEAD = "tests/losses/test_functional.py"
MODES = "tests/engine/test_modes.py"
UNSEEN = "tests/engine/test_unseen.py"
VERIFY = "tests/laws/test_conservation.py"

MUTATIONS: dict[str, Mutation] = {
    "leaves of our own": Mutation(
        "problem.py",
        "Problem.leaves",
        "leaf if is_own(leaf) else leaf.detach().requires_grad_()",
        "leaf if False else leaf.detach().requires_grad_()",
        (UNSEEN,),
    ),
    "ignored tokens have a loss": Mutation(
        "functional.py",
        "linear_cross_entropy",
        "losses = torch.where(valid, losses.reshape(targets.shape), 0)",
        "losses = losses.reshape(targets.shape)",
        (HEAD, "-k", "values_and_gradients"),
    ),
    "ignored tokens are counted": Mutation(
        "functional.py",
        "linear_cross_entropy",
        "losses / valid.sum(axes)",
        "losses / torch.ones_like(valid).sum(axes)",
        (HEAD, "-k", "reductions"),
    ),
    "memory is not put back": Mutation(
        "side_effects.py",
        "restore",
        "memory.copy_(copy)",
        "memory.copy_(memory)",
        (MODES, AWKWARD, "-k", "buffers or bank"),
    ),
    "calls of a mode's own": Mutation(
        "side_effects.py",
        "_WriteLog.__torch_dispatch__",
        "with torch._C.DisableTorchFunction():  # what runs is no call by the user\n    out = func(*args, **kwargs)",
        "if True:  # what runs is no call by the user\n    out = func(*args, **kwargs)",
        (VERIFY,),
    ),
}
