"""What the tests of this wing must notice."""

from tests.mutation import Mutation

CONTRACT = "tests/algebra/test_contractions.py"
LOWRANK = "tests/algebra/test_compression.py"
TRACKING = "tests/algebra/test_tracking.py"

MUTATIONS: dict[str, Mutation] = {
    "products in one go": Mutation(
        "algebra/sums.py",
        "piece",
        "return LONG if m >= FEW and n >= FEW else SHORT",
        "return 2**62",
        ("tests/algebra/test_sums.py",),
    ),
    "first row of a slice": Mutation(
        "algebra/factors.py",
        "blocks",
        "(factor.index >= start) & (factor.index < stop)",
        "(factor.index > start) & (factor.index < stop)",
        (CONTRACT, "-k", "exact"),
    ),
    "every row the same": Mutation(
        "algebra/contractions.py",
        "_products",
        "same = one.index.unsqueeze(-1) == other.index.unsqueeze(-2)",
        "same = 0 * one.index.unsqueeze(-1) == other.index.unsqueeze(-2)",
        (CONTRACT, "-k", "exact"),
    ),
    "outer products meet the first row": Mutation(
        "algebra/contractions.py",
        "_products",
        "index = other.index.unsqueeze(-2).expand(*rows.shape[:-1], -1)",
        "index = 0 * other.index.unsqueeze(-2).expand(*rows.shape[:-1], -1)",
        (CONTRACT, "-k", "exact"),
    ),
    "cross terms once": Mutation(
        "algebra/contractions.py",
        "squared_norms",
        "1 if i == j else 2",
        "1 if i == j else 1",
        (CONTRACT, "-k", "exact"),
    ),
    "any positions as one": Mutation(
        "algebra/contractions.py",
        "squared_norms",
        "len(uses) == 1 and isinstance(uses[0], Outer) and uses[0].positions == uses[0].form.blocks[0] == 1",
        "len(uses) == 1 and isinstance(uses[0], Outer) and uses[0].positions >= uses[0].form.blocks[0] == 1",
        (CONTRACT, "-k", "exact"),
    ),
    "the last samples of a slice": Mutation(
        "algebra/contractions.py",
        "_materialised_norms",
        "range(0, b, together)",
        "range(0, max(b - 1, 1), together)",
        (CONTRACT, "-k", "exact"),
    ),
    "what is kept is written to": Mutation(
        "algebra/contractions.py",
        "_gradients",
        "ours or whole is not found or not isinstance(use, Dense)",
        "ours or whole is not found or True",
        (CONTRACT, "-k", "exact"),
    ),
    "blocks of another order": Mutation(
        "algebra/contractions.py",
        "fits",
        "use.form.plain and use.form.blocks == blocks",
        "use.form.blocks == blocks",
        (CONTRACT, "-k", "low_rank"),
    ),
    "the bound is rounded down": Mutation(
        "algebra/compression.py",
        "certified_bound",
        "rounded.double() < raised",
        "rounded.double() > raised",
        (LOWRANK, "-k", "rounded_up"),
    ),
    "the bound of the last leaf": Mutation(
        "algebra/compression.py",
        "certified_bound",
        "total = total + torch.where((leaf.residual == 0) | (norms[name] == 0), 0.0, term)",
        "total = torch.where((leaf.residual == 0) | (norms[name] == 0), 0.0, term)",
        (LOWRANK, "-k", "bound_is_the_sum"),
    ),
    "a bound beyond all gradients": Mutation(
        "algebra/compression.py",
        "certified_bound",
        "(leaf.residual == 0) | (norms[name] == 0)",
        "(leaf.residual == 0) ",
        (TRACKING, "-k", "no_bound"),
    ),
    "a bound where none is known": Mutation(
        "algebra/tracking.py",
        "_tracked",
        "old.residual.new_full((), math.inf)",
        "old.residual.new_zeros(())",
        (TRACKING, "-k", "no_bound"),
    ),
    "the first use alone is tracked": Mutation(
        "algebra/tracking.py",
        "_tracked.product",
        "[_outward(use, onto, _inward(use, 1 - onto, start)) for use in factored]",
        "[_outward(use, onto, _inward(use, 1 - onto, start)) for use in factored[:1]]",
        (TRACKING, "-k", "every_form"),
    ),
    "tracked in the dtype of autocast": Mutation(
        "algebra/tracking.py",
        "_renewed",
        "as_written(old.device)",
        "torch.set_grad_enabled(torch.is_grad_enabled())",
        (TRACKING, "-k", "autocast"),
    ),
    "squares of the whole range": Mutation(
        "algebra/tracking.py",
        "_largest",
        "side.abs().amax(1, keepdim=True)",
        "side.square().sum(1, keepdim=True).sqrt()",
        (TRACKING, "-k", "far_from_one"),
    ),
    "the longer side as the basis": Mutation(
        "algebra/tracking.py",
        "_tracked",
        "(0, 1) if blocks[1] <= blocks[2] else (1, 0)",
        "(0, 1) if blocks[1] > blocks[2] else (1, 0)",
        (TRACKING, "-k", "every_form"),
    ),
    "zeros stay zeros": Mutation(
        "algebra/tracking.py", "_largest", "torch.where(found == 0, 1, found)", "found", (TRACKING, "-k", "zeros")
    ),
}
