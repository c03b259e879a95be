"""What the tests of this wing must notice."""

from tests.mutation import Mutation

AWKWARD = "tests/engine/test_awkward.py"
CHECKPOINTS = "tests/engine/test_checkpointing.py"
EXAMPLE = "tests/losses/test_per_example.py"
LAYERS = "tests/engine/test_nn_layers.py"
LAYOUT = "tests/ops/test_layout.py"
MOVES = "tests/ops/test_moves.py"
SIZES = "tests/transforms/test_sizes.py"
OWN_RULES = "tests/ops/test_rules_in_steps.py"
REDUCERS = "tests/reducers/test_reducers.py"
RULES = "tests/ops/test_rules.py"
VERIFY = "tests/laws/test_conservation.py"

MUTATIONS: dict[str, Mutation] = {
    "folds swapped": Mutation("ops/layout.py", 'high = self.fold == "high"', 'high = self.fold != "high"', (LAYOUT,)),
    "one fold alone": Mutation("ops/layout.py", '= ("high", "low")', '= ("high", "high")', (LAYOUT,)),
    "first of several layouts": Mutation(
        "ops/meter.py", "return found[0] if len(found) == 1 else None", "return found[0] if found else None", (LAYOUT,)
    ),
    "silence is a layout": Mutation(
        "ops/meter.py",
        "return self.base is None or (self.clock.batch > 1 and not self.base.largest)",
        "return False",
        (LAYOUT,),
    ),
    "any ratio agrees": Mutation(
        "ops/meter.py", "        256 * wide.eps,", "        1e14 * wide.eps,", (AWKWARD, "-k", "weak_term")
    ),
    "one code for all samples": Mutation(
        "ops/meter.py", "while not found or int(digits ** len(found)) < batch:", "while not found:", (LAYOUT,)
    ),
    "rows overwritten": Mutation(
        "ops/layout.py", "index_add(0, self.samples, rows)", "index_copy(0, self.samples, rows)", (MOVES,)
    ),
    "a layout that need not fit": Mutation(
        "ops/layout.py",
        'return size == batch if self.fold == "whole" else size % batch == 0',
        "return True",
        (LAYOUT, MOVES, AWKWARD, "-k", "fits or follow"),
    ),
    "attention as a whole": Mutation(
        "ops/composite.py",
        "if op not in COMPOSITES or",
        "if True or",
        ("tests/engine/test_flops.py", "-k", "transformer"),
    ),
    "the first sample for all": Mutation(
        "ops/known.py",
        "value.narrow(axis, sample * length, length)",
        "value.narrow(axis, 0, length)",
        ("tests/ops/test_slices.py",),
    ),
    "masks for all": Mutation(
        "ops/apart.py", "each = slices if fits else None", "each = None", ("tests/ops/test_slices.py",)
    ),
    "rows for another batch": Mutation(
        "ops/uses.py", "self.at_once and where == IN_FRONT", "self.at_once", (REDUCERS,)
    ),
    "a tap that is a view": Mutation(
        "ops/call.py",
        "torch.ops.aten._unsafe_view(value, value.shape)",
        "value.view_as(value)",
        (EXAMPLE,),
    ),
    "nothing forgotten": Mutation(
        "ops/values.py",
        "value is None or value.reference() is not tensor",
        "value is None",
        (CHECKPOINTS, AWKWARD, "-k", "dead or cell or follow"),
    ),
    "sums of samples are pure": Mutation(
        "ops/moves.py",
        "return (self.squares * self.number == self.total.square()).all()",
        "return self.total.new_ones(()) > 0",
        (MOVES,),
    ),
    "nothing moves by data": Mutation(
        "ops/moves.py",
        "return any(other is None or not _same(plain, other) for other in shuffled)",
        "return False",
        (MOVES, AWKWARD, "-k", "packed or route or anew"),
    ),
    "any place is the planned one": Mutation(
        "ops/moves.py",
        "((samples == expected) | (sources.number == 0)).all()",
        "(samples == samples).all()",
        (MOVES, AWKWARD, "-k", "packed or added or anew"),
    ),
    "one factor of a product": Mutation(
        "ops/tangent.py",
        "return [((slot,), ()) for slot in call.tracked]",
        "return [((slot,), ()) for slot in call.tracked[:1]]",
        (RULES, AWKWARD, "-k", "disguise or outer"),
    ),
    "a bias twice": Mutation(
        "ops/tangent.py", "tangents[0].new_zeros((), dtype", "tangents[0].new_ones((), dtype", (RULES, OWN_RULES)
    ),
    "the forward of an embedding": Mutation(
        "ops/tangent.py", "if rule.factor else None", "if False else None", (LAYERS, "-k", "Embedding")
    ),
    "in place on what is kept": Mutation(
        "ops/call.py",
        "copied[slot] = copied[slot].clone()",
        "copied[slot] = copied[slot]",
        (AWKWARD, "-k", "written or added"),
    ),
    "padding in the mean": Mutation(
        "ops/families/tables.py",
        "kept.sum(-1, keepdim=True)",
        "index.shape[-1] * kept.new_ones(1)",
        (LAYERS, "-k", "Bag"),
    ),
    "padding in the bag": Mutation(
        "ops/families/tables.py",
        "if padding is None else (index != padding %",
        "if True else (index != padding %",
        (LAYERS, "-k", "Bag"),
    ),
    "bags without weights": Mutation(
        "ops/families/tables.py", "(scale * weights[0] if weights else scale)", "scale", (LAYERS, "-k", "Bag")
    ),
    "only the padding": Mutation(
        "ops/families/tables.py", "(index != padding)", "(index == padding)", (LAYERS, "-k", "Embedding")
    ),
    "frequency upside down": Mutation(
        "ops/families/tables.py",
        "return 1 / count if factor",
        "return count if factor",
        (LAYERS, RULES, OWN_RULES, "-k", "Embedding or embedding"),
    ),
    "a maximum is linear": Mutation(
        "ops/families/tables.py", 'return a.get("mode", "mean") != "max" and', "return", (LAYERS, "-k", "refused")
    ),
    "flags do not count": Mutation("ops/digest.py", "flags.append(2 + leaf)", "pass", (AWKWARD, "-k", "by_a_flag")),
    "sizes do not count": Mutation(
        "ops/digest.py", "numbers += leaf.shape", "pass", (VERIFY, AWKWARD, "-k", "new_sizes")
    ),
    "how far is rolled is a size": Mutation("ops/digest.py", "        if fixed:\n", "        if False:\n", (SIZES,)),
    "swapped roles": Mutation(
        "ops/uses.py",
        "Outer(right, left, form) if a.swapped",
        "Outer(left, right, form) if a.swapped",
        (REDUCERS, "-k", "test_op and matmul"),
    ),
    "a scale forgotten": Mutation(
        "ops/uses.py", "left = left * product.scale", "left = left * 1", (REDUCERS, "-k", "test_op and addmm")
    ),
    "a shift without its sign": Mutation(
        "ops/uses.py", "total * product.scale", "total * 1", (REDUCERS, "-k", "test_op and shift")
    ),
    "padding counts": Mutation(
        "ops/uses.py",
        "g * scale[0] if scale else g",
        "g",
        (REDUCERS, "-k", "called_otherwise and (padding or frequency)"),
    ),
    "derivatives of all samples": Mutation(
        "ops/apart.py",
        "[sample] = where.by_sample(gradient, batch)[sample]",
        "[:] = where.by_sample(gradient, batch)",
        (REDUCERS, "-k", "test_layer and GRU"),
    ),
    "rows of all samples": Mutation(
        "ops/apart.py",
        "(where.samples == sample)",
        "(where.samples >= 0)",
        (REDUCERS, "-k", "test_awkward_model and (experts or sorted)"),
    ),
    "padding on the wrong side": Mutation(
        "ops/families/convolutions.py",
        "(size // 2, size - size // 2)",
        "(size - size // 2, size // 2)",
        (REDUCERS, "-k", "test_convolution and 1d"),
    ),
    "padding of the wrong axis": Mutation(
        "ops/families/convolutions.py",
        "for pair in reversed(pads)",
        "for pair in pads",
        (REDUCERS, "-k", "test_convolution and 2d"),
    ),
    "alpha in place of beta": Mutation(
        "ops/families/products.py",
        '"beta" if name == "input" else "alpha"',
        '"alpha" if name == "input" else "beta"',
        (REDUCERS, "-k", "test_op and addmm"),
    ),
    "reflected subtraction": Mutation(
        "ops/families/sums.py",
        "((T.__rsub__,), (-1, 1))",
        "((T.__rsub__,), (1, -1))",
        (REDUCERS, "-k", "shift or rsub"),
    ),
    "alpha of the other argument": Mutation(
        "ops/families/sums.py",
        '(name == "other" and sign_of_input > 0)',
        '(name == "input" and sign_of_input > 0)',
        (REDUCERS, "-k", "test_op and shift"),
    ),
    "rows from the start alone": Mutation(
        "ops/families/tables.py", "(saved[0] % size,)", "(saved[0],)", (REDUCERS, "-k", "test_op and rows")
    ),
    "patches where gradients are smaller": Mutation(
        "ops/uses.py",
        "if product.gradients is not None and in_front",
        "if False and in_front",
        (REDUCERS, "-k", "convolution"),
    ),
    "one form for all shapes": Mutation(
        "ops/call.py",
        "known += (leaf.shape, leaf.dtype, leaf.layout)",
        "known += (leaf.dtype, leaf.layout)",
        (REDUCERS, "-k", "test_op or convolution"),
    ),
}
