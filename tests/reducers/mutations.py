"""What the tests of this wing must notice."""

from tests.mutation import Mutation

POSITIONS = "tests/reducers/test_positions.py"
PROJECTIONS = "tests/reducers/test_projections.py"

MUTATIONS: dict[str, Mutation] = {
    "one projection for all names": Mutation(
        "reducers/projections.py",
        "Project.of_parameter",
        "self._of_use(seed_of(self.seed, name), use)",
        "self._of_use(seed_of(self.seed, ''), use)",
        (PROJECTIONS, "-k", "every_name"),
    ),
    "two sides with the same signs": Mutation(
        "reducers/projections.py",
        "Project._two_sided.signs",
        'seed_of(seed, f"{side}")',
        'seed_of(seed, "0")',
        (PROJECTIONS, "-k", "kronecker"),
    ),
    "every slice is the first": Mutation(
        "reducers/projections.py",
        "Project._entrywise.terms",
        "places = torch.arange(at * n, stop * n, device=part.device)",
        "places = torch.arange(0, (stop - at) * n, device=part.device)",
        (PROJECTIONS, "-k", "no_split"),
    ),
    "what is left out is of the first segment": Mutation(
        "reducers/positions.py",
        "PerSegment.result",
        "torch.where((ids < 0) | (ids >= self.segments), self.segments, ids)",
        "torch.where((ids < 0) | (ids >= self.segments), 0, ids)",
        (POSITIONS, "-k", "segments"),
    ),
}
