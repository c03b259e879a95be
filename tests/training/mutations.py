"""What the tests of this wing must notice."""

from tests.mutation import Mutation

MUTATIONS: dict[str, Mutation] = {
    "a difference that has lost its digits": Mutation(
        "training/path_average.py",
        "elementwise_average",
        "average.put_(places, middle)",
        "average",
        ("tests/training",),
    ),
    "the root of zero has the derivative of a root": Mutation(
        "training/update_rules.py", "root", "differentiated(value)", "False", ("tests/training",)
    ),
}
