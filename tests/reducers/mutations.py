"""What the tests of this wing must notice."""

from tests.mutation import Mutation

POSITIONS = "tests/reducers/test_positions.py"
PROJECTIONS = "tests/reducers/test_projections.py"

MUTATIONS: dict[str, Mutation] = {
    "one projection for all names": Mutation(
        "reducers/projections.py",
        "self._of_use(seed_of(self.seed, name)",
        "self._of_use(seed_of(self.seed, '')",
        (PROJECTIONS, "-k", "every_name"),
    ),
    "two sides with the same signs": Mutation(
        "reducers/projections.py", 'seed_of(seed, f"{side}")', 'seed_of(seed, "0")', (PROJECTIONS, "-k", "kronecker")
    ),
    "every slice is the first": Mutation(
        "reducers/projections.py",
        "places = torch.arange(at * n, stop * n",
        "places = torch.arange(0, (stop - at) * n",
        (PROJECTIONS, "-k", "no_split"),
    ),
    "what is left out is of the first segment": Mutation(
        "reducers/positions.py", "self.segments, ids)", "0, ids)", (POSITIONS, "-k", "segments")
    ),
}
