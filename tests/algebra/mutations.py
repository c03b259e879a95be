"""What the tests of this wing must notice."""

from tests.mutation import Mutation

CONTRACT = "tests/algebra/test_contractions.py"
LOWRANK = "tests/algebra/test_compression.py"
TRACKING = "tests/algebra/test_tracking.py"

MUTATIONS: dict[str, Mutation] = {
    "products in one go": Mutation(
        "algebra/sums.py",
        "return LONG if m >= FEW and n >= FEW else SHORT",
        "return 2**62",
        ("tests/algebra/test_sums.py",),
    ),
    "first row of a slice": Mutation(
        "algebra/factors.py", "(factor.index >= start)", "(factor.index > start)", (CONTRACT, "-k", "exact")
    ),
    "every row the same": Mutation(
        "algebra/contractions.py", "same = one.index", "same = 0 * one.index", (CONTRACT, "-k", "exact")
    ),
    "outer products meet the first row": Mutation(
        "algebra/contractions.py", "index = other.index", "index = 0 * other.index", (CONTRACT, "-k", "exact")
    ),
    "cross terms once": Mutation(
        "algebra/contractions.py", "if i == j else 2", "if i == j else 1", (CONTRACT, "-k", "exact")
    ),
    "any positions as one": Mutation(
        "algebra/contractions.py",
        "isinstance(uses[0], Outer) and uses[0].positions ==",
        "isinstance(uses[0], Outer) and uses[0].positions >=",
        (CONTRACT, "-k", "exact"),
    ),
    "the last samples of a slice": Mutation(
        "algebra/contractions.py",
        "range(0, b, together)",
        "range(0, max(b - 1, 1), together)",
        (CONTRACT, "-k", "exact"),
    ),
    "what is kept is written to": Mutation(
        "algebra/contractions.py", "or not isinstance(use, Dense)", "or True", (CONTRACT, "-k", "exact")
    ),
    "blocks of another order": Mutation(
        "algebra/contractions.py",
        "use.form.plain and use.form.blocks == blocks",
        "use.form.blocks == blocks",
        (CONTRACT, "-k", "low_rank"),
    ),
    "the bound is rounded down": Mutation(
        "algebra/compression.py",
        "rounded.double() < raised",
        "rounded.double() > raised",
        (LOWRANK, "-k", "rounded_up"),
    ),
    "the bound of the last leaf": Mutation(
        "algebra/compression.py",
        "total = total + torch.where(",
        "total = torch.where(",
        (LOWRANK, "-k", "bound_is_the_sum"),
    ),
    "a bound beyond all gradients": Mutation(
        "algebra/compression.py", "| (norms[name] == 0)", "", (TRACKING, "-k", "no_bound")
    ),
    "a bound where none is known": Mutation(
        "algebra/tracking.py", "new_full((), math.inf)", "new_zeros(())", (TRACKING, "-k", "no_bound")
    ),
    "the first use alone is tracked": Mutation(
        "algebra/tracking.py", "for use in factored]", "for use in factored[:1]]", (TRACKING, "-k", "every_form")
    ),
    "tracked in the dtype of autocast": Mutation(
        "algebra/tracking.py", "with as_written(old.device):", "if True:", (TRACKING, "-k", "autocast")
    ),
    "squares of the whole range": Mutation(
        "algebra/tracking.py",
        "side.abs().amax(1, keepdim=True)",
        "side.square().sum(1, keepdim=True).sqrt()",
        (TRACKING, "-k", "far_from_one"),
    ),
    "the longer side as the basis": Mutation(
        "algebra/tracking.py",
        "if blocks[1] <= blocks[2] else",
        "if blocks[1] > blocks[2] else",
        (TRACKING, "-k", "every_form"),
    ),
    "zeros stay zeros": Mutation(
        "algebra/tracking.py", "torch.where(found == 0, 1, found)", "found", (TRACKING, "-k", "zeros")
    ),
}
