"""What the tests of this wing must notice."""

from tests.mutation import Mutation

AWKWARD = "tests/engine/test_awkward.py"
CHECKPOINTS = "tests/engine/test_checkpointing.py"
DERIVATIVES = "tests/ops/test_derivatives.py"
EXAMPLE = "tests/losses/test_per_example.py"
LAYERS = "tests/engine/test_nn_layers.py"
LAYOUT = "tests/ops/test_layout.py"
MOVES = "tests/ops/test_moves.py"
SIZES = "tests/transforms/test_sizes.py"
OWN_RULES = "tests/ops/test_rules_in_steps.py"
RECURRENT = "tests/ops/test_recurrent.py"
REDUCERS = "tests/reducers/test_reducers.py"
RULES = "tests/ops/test_rules.py"
VERIFY = "tests/laws/test_conservation.py"

MUTATIONS: dict[str, Mutation] = {
    "rows of a sample in one place": Mutation(
        "ops/layout.py",
        "Placed.by_sample",
        "(self.samples * most + self._turn)",
        "(self.samples * most + self._turn * 0)",
        (RECURRENT,),
    ),
    "any sequence is of one sample": Mutation(
        "ops/unrolled.py",
        "_of_sequences",
        "return own if torch.equal(own[steps.sequence], samples) else None",
        "return own",
        (RECURRENT,),
    ),
    "states of other sequences": Mutation(
        "ops/recurrence.py",
        "Steps.before",
        "states[own.start : own.start + n]",
        "states[own.stop - n : own.stop]",
        (RECURRENT,),
    ),
    "a last bag that ends": Mutation(
        "ops/families/tables.py", "_bags.ragged", "offsets = offsets[:-1]", "offsets = offsets[:]", (RECURRENT,)
    ),
    "padding is of a sample": Mutation(
        "ops/moves.py",
        "_where",
        "((samples == spread(along(samples, axis), axis, samples.shape)) | ~some)",
        "(samples == spread(along(samples, axis), axis, samples.shape))",
        (RECURRENT,),
    ),
    "statistics that do not move": Mutation(
        "ops/families/norms.py", "_batch_norm", 'a.get("training", False)', "False", (DERIVATIVES,)
    ),
    "a shift without its scale": Mutation(
        "ops/families/norms.py", "_batch_norm", "torch.zeros_like(shift)", "torch.ones_like(shift)", (DERIVATIVES,)
    ),
    "activations that write after all": Mutation(
        "ops/call.py", "Call.evaluate", "(*args[:at], False)", "(*args[:at], True)", (DERIVATIVES,)
    ),
    "folds swapped": Mutation(
        "ops/layout.py", "Layout.by_sample", 'high = self.fold == "high"', 'high = self.fold != "high"', (LAYOUT,)
    ),
    "one fold alone": Mutation(
        "ops/layout.py",
        "candidates",
        'folds: tuple[Fold, Fold] = ("high", "low")',
        'folds: tuple[Fold, Fold] = ("high", "high")',
        (LAYOUT,),
    ),
    "first of several layouts": Mutation(
        "ops/meter.py",
        "Meter.layout",
        "return found[0] if len(found) == 1 else None",
        "return found[0] if found else None",
        (LAYOUT,),
    ),
    "silence is a layout": Mutation(
        "ops/meter.py",
        "Meter.silent",
        "return self.base is None or (self.clock.batch > 1 and not self.base.largest)",
        "return False",
        (LAYOUT,),
    ),
    "any ratio agrees": Mutation(
        "ops/meter.py", "seen", "256 * wide.eps", "1e14 * wide.eps", (AWKWARD, "-k", "weak_term")
    ),
    "one code for all samples": Mutation(
        "ops/meter.py", "codes", "not found or int(digits ** len(found)) < batch", "not found", (LAYOUT,)
    ),
    "rows overwritten": Mutation(
        "ops/layout.py",
        "Placed.sum",
        "like.new_zeros(len(like)).index_add(0, self.samples, rows)",
        "like.new_zeros(len(like)).index_copy(0, self.samples, rows)",
        (MOVES,),
    ),
    "a layout that need not fit": Mutation(
        "ops/layout.py",
        "Layout.fits",
        'return size == batch if self.fold == "whole" else size % batch == 0',
        "return True",
        (LAYOUT, MOVES, AWKWARD, "-k", "fits or follow"),
    ),
    "attention as a whole": Mutation(
        "ops/composite.py",
        "opened",
        "op not in COMPOSITES",
        "True",
        ("tests/engine/test_flops.py", "-k", "transformer"),
    ),
    "the first sample for all": Mutation(
        "ops/known.py",
        "of_one",
        "value.narrow(axis, sample * length, length)",
        "value.narrow(axis, 0, length)",
        ("tests/ops/test_slices.py",),
    ),
    "masks for all": Mutation(
        "ops/apart.py",
        "by_autograd.factors",
        "each = slices if fits else None",
        "each = None",
        ("tests/ops/test_slices.py",),
    ),
    "rows for another batch": Mutation(
        "ops/uses.py",
        "Axes.arrange",
        "self.at_once and where == IN_FRONT and value.numel()",
        "self.at_once and value.numel()",
        (REDUCERS,),
    ),
    "a tap that is a view": Mutation(
        "ops/call.py", "alias", "torch.ops.aten._unsafe_view(value, value.shape)", "value.view_as(value)", (EXAMPLE,)
    ),
    "nothing forgotten": Mutation(
        "ops/values.py",
        "Values.of",
        "value is None or value.reference() is not tensor",
        "value is None",
        (CHECKPOINTS, AWKWARD, "-k", "dead or cell or follow"),
    ),
    "sums of samples are pure": Mutation(
        "ops/moves.py",
        "Sources.pure",
        "return (self.squares * self.number == self.total.square()).all()",
        "return self.total.new_ones(()) > 0",
        (MOVES,),
    ),
    "nothing moves by data": Mutation(
        "ops/moves.py",
        "Move.by_data",
        "return any(other is None or not _same(plain, other) for other in shuffled)",
        "return False",
        (MOVES, AWKWARD, "-k", "packed or route or anew"),
    ),
    "any place is the planned one": Mutation(
        "ops/moves.py",
        "Moved.follow",
        "((samples == expected) | (sources.number == 0)).all()",
        "(samples == samples).all()",
        (MOVES, AWKWARD, "-k", "packed or added or anew"),
    ),
    "one factor of a product": Mutation(
        "ops/tangent.py",
        "_terms",
        "return [((slot,), ()) for slot in call.tracked]",
        "return [((slot,), ()) for slot in call.tracked[:1]]",
        (RULES, AWKWARD, "-k", "disguise or outer"),
    ),
    "a bias twice": Mutation(
        "ops/tangent.py",
        "_by_rule.evaluate",
        "tangents[0].new_zeros((), dtype=blank[1])",
        "tangents[0].new_ones((), dtype=blank[1])",
        (RULES, OWN_RULES),
    ),
    "the forward of an embedding": Mutation(
        "ops/tangent.py",
        "_by_rule.evaluate",
        "rule.factor(_bind(call, rule, leaves)) if rule.factor else None",
        "rule.factor(_bind(call, rule, leaves)) if False else None",
        (LAYERS, "-k", "Embedding"),
    ),
    "in place on what is kept": Mutation(
        "ops/call.py",
        "Call.evaluate",
        "copied[slot] = copied[slot].clone()",
        "copied[slot] = copied[slot]",
        (AWKWARD, "-k", "written or added"),
    ),
    "padding in the mean": Mutation(
        "ops/families/tables.py",
        "_bags.values",
        "scale.sum(-1, keepdim=True)",
        "index.shape[-1] * scale.new_ones(1)",
        (LAYERS, "-k", "Bag"),
    ),
    "padding in the bag": Mutation(
        "ops/families/tables.py",
        "_bags.kept",
        "index.new_ones(index.shape, dtype=dtype) if padding is None else (index != padding % length).to(dtype)",
        "index.new_ones(index.shape, dtype=dtype) if True else (index != padding % length).to(dtype)",
        (LAYERS, "-k", "Bag"),
    ),
    "bags without weights": Mutation(
        "ops/families/tables.py",
        "_bags.values",
        "(scale * weights[0] if weights else scale).unsqueeze",
        "scale.unsqueeze",
        (LAYERS, "-k", "Bag"),
    ),
    "only the padding": Mutation(
        "ops/families/tables.py",
        "_lookup_factor",
        "(index != padding).unsqueeze",
        "(index == padding).unsqueeze",
        (LAYERS, "-k", "Embedding"),
    ),
    "frequency upside down": Mutation(
        "ops/families/tables.py",
        "_lookup_factor",
        "return 1 / count if factor is None else factor / count",
        "return count if factor is None else factor / count",
        (LAYERS, RULES, OWN_RULES, "-k", "Embedding or embedding"),
    ),
    "a maximum is linear": Mutation(
        "ops/families/tables.py",
        "_adds_rows",
        'return a.get("mode", "mean") != "max" and a.get("max_norm") is None and not a.get("scale_grad_by_freq")',
        'return a.get("max_norm") is None and not a.get("scale_grad_by_freq")',
        (LAYERS, "-k", "refused"),
    ),
    "flags do not count": Mutation(
        "ops/digest.py", "Digest.add", "flags.append(2 + leaf)", "None", (AWKWARD, "-k", "by_a_flag")
    ),
    "sizes do not count": Mutation(
        "ops/digest.py", "Digest.add", "numbers += leaf.shape", "None", (VERIFY, AWKWARD, "-k", "new_sizes")
    ),
    "how far is rolled is a size": Mutation("ops/digest.py", "Digest._note", "fixed", "False", (SIZES,)),
    "swapped roles": Mutation(
        "ops/uses.py",
        "_by_letters.factors",
        "Outer(right, left, form) if a.swapped else Outer(left, right, form)",
        "Outer(left, right, form) if a.swapped else Outer(left, right, form)",
        (REDUCERS, "-k", "test_op and matmul"),
    ),
    "a scale forgotten": Mutation(
        "ops/uses.py",
        "_by_letters.factors",
        "left = left * product.scale",
        "left = left * 1",
        (REDUCERS, "-k", "test_op and addmm"),
    ),
    "a shift without its sign": Mutation(
        "ops/uses.py",
        "_by_letters.factors",
        "total * product.scale",
        "total * 1",
        (REDUCERS, "-k", "test_op and shift"),
    ),
    "padding counts": Mutation(
        "ops/lookups.py",
        "by_index.factors",
        "g * others[0] if others else g",
        "g",
        (REDUCERS, "-k", "called_otherwise and (padding or frequency)"),
    ),
    "derivatives of all samples": Mutation(
        "ops/apart.py",
        "of_sample",
        "where.by_sample(masked, batch)[sample] = where.by_sample(gradient, batch)[sample]",
        "where.by_sample(masked, batch)[:] = where.by_sample(gradient, batch)",
        (REDUCERS, "-k", "test_layer and GRU"),
    ),
    "rows of all samples": Mutation(
        "ops/apart.py",
        "of_sample",
        "(where.samples == sample).view",
        "(where.samples >= 0).view",
        (REDUCERS, "-k", "test_awkward_model and (experts or sorted)"),
    ),
    "padding on the wrong side": Mutation(
        "ops/families/convolutions.py",
        "_convolution",
        "(size // 2, size - size // 2)",
        "(size - size // 2, size // 2)",
        (REDUCERS, "-k", "test_convolution and 1d"),
    ),
    "padding of the wrong axis": Mutation(
        "ops/families/convolutions.py",
        "_convolution",
        "[size for pair in reversed(pads) for size in pair]",
        "[size for pair in pads for size in pair]",
        (REDUCERS, "-k", "test_convolution and 2d"),
    ),
    "alpha in place of beta": Mutation(
        "ops/families/products.py",
        "_add_product.product",
        '"beta" if name == "input" else "alpha"',
        '"alpha" if name == "input" else "beta"',
        (REDUCERS, "-k", "test_op and addmm"),
    ),
    "reflected subtraction": Mutation(
        "ops/families/sums.py",
        "_ops",
        "((T.__rsub__,), (-1, 1))",
        "((T.__rsub__,), (1, -1))",
        (REDUCERS, "-k", "shift or rsub"),
    ),
    "alpha of the other argument": Mutation(
        "ops/families/sums.py",
        "_add.shift",
        'scale < 0 or (name == "other" and sign_of_input > 0)',
        'scale < 0 or (name == "input" and sign_of_input > 0)',
        (REDUCERS, "-k", "test_op and shift"),
    ),
    "rows from the start alone": Mutation(
        "ops/families/tables.py", "_rows", "(saved[0] % size,)", "(saved[0],)", (REDUCERS, "-k", "test_op and rows")
    ),
    "patches where gradients are smaller": Mutation(
        "ops/uses.py",
        "_by_letters.factors",
        "product.gradients is not None and in_front and not levels",
        "False",
        (REDUCERS, "-k", "convolution"),
    ),
    "one form for all shapes": Mutation(
        "ops/call.py",
        "Call.key",
        "known += (leaf.shape, leaf.dtype, leaf.layout)",
        "known += (leaf.dtype, leaf.layout)",
        (REDUCERS, "-k", "test_op or convolution"),
    ),
}
