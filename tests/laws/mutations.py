"""What the tests of this wing must notice."""

from tests.mutation import Mutation

AWKWARD = "tests/engine/test_awkward.py"
REDUCERS = "tests/reducers/test_reducers.py"
VERIFY = "tests/laws/test_conservation.py"

MUTATIONS: dict[str, Mutation] = {
    "no law of factors": Mutation(
        "laws/factored.py",
        "_compare",
        "wrong += [names[i] for i in group]",
        "wrong += []",
        (REDUCERS, "-k", "law_of_factors"),
    ),
    "rounding of the parameters alone": Mutation(
        "laws/draws.py",
        "near",
        "max(rounding(leaf.dtype), rounding(precision))",
        "rounding(leaf.dtype)",
        (VERIFY, "-k", "autocast"),
    ),
    "no law": Mutation(
        "laws/conservation.py",
        "_broken",
        "not abs(ours - wanted) <= seen.tolerance * scale",
        "False",
        (AWKWARD, "-k", "hidden or view or vmap"),
    ),
    "small gradients vanish": Mutation(
        "laws/conservation.py",
        "witness",
        "boost = min(largest / max(norm, 1e-30), 1e3) if isfinite(norm) else 1.0",
        "boost = min(1.0, 1e3) if isfinite(norm) else 1.0",
        (VERIFY, "-k", "missed"),
    ),
}
