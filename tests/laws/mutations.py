"""What the tests of this wing must notice."""

from tests.mutation import Mutation

AWKWARD = "tests/engine/test_awkward.py"
REDUCERS = "tests/reducers/test_reducers.py"
VERIFY = "tests/laws/test_conservation.py"

MUTATIONS: dict[str, Mutation] = {
    "no law of factors": Mutation("laws/factored.py", "if wrong:", "if False:", (REDUCERS, "-k", "law_of_factors")),
    "no law": Mutation(
        "laws/conservation.py",
        "if not abs(ours - wanted) <= seen.tolerance * scale:",
        "if False:",
        (AWKWARD, "-k", "hidden or view or vmap"),
    ),
    "small gradients vanish": Mutation(
        "laws/conservation.py",
        "boost = min(largest / max(norm, 1e-30), 1e3)",
        "boost = min(1.0, 1e3)",
        (VERIFY, "-k", "missed"),
    ),
}
