"""Breaks one rule of funcghost at a time, in a copy, and asks the tests whether they see it.

`python tests/mutation.py [name ...]` says for each mutation which test killed it, or that it SURVIVED; it ends with 1
if one survives, or if its text does not stand exactly once in the source any more.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("funcghost", "tests", "examples", "pyproject.toml")

LAYOUT, MOVES, RULES, VERIFY = (
    f"tests/{name}.py" for name in ("ops/test_layout", "ops/test_moves", "ops/test_rules", "laws/test_conservation")
)
MODES, AUTOCAST, CHECKPOINTS = (
    f"tests/engine/{name}.py" for name in ("test_modes", "test_mixed_precision", "test_checkpointing")
)
LIFTING, OWN_RULES = "tests/transforms/test_lifting.py", "tests/ops/test_rules_in_steps.py"
EXAMPLE = "tests/losses/test_per_example.py"
AWKWARD, LAYERS = "tests/engine/test_awkward.py", "tests/engine/test_nn_layers.py"
CONTRACT, REDUCERS, PAIRS = (
    f"tests/{name}.py" for name in ("algebra/test_contractions", "reducers/test_reducers", "algebra/test_pairs")
)
LOWRANK, PROJECTIONS, POSITIONS = (
    f"tests/{name}.py" for name in ("algebra/test_compression", "reducers/test_projections", "reducers/test_positions")
)
UNSEEN = "tests/engine/test_unseen.py"
HEAD, TRACKING = "tests/losses/test_functional.py", "tests/algebra/test_tracking.py"
COMPILED, ONE_OP = "tests/transforms/test_compiled.py", "tests/transforms/test_one_op.py"


class Mutation(NamedTuple):
    """`text` in a file of the package becomes `instead`; `tests` are pytest's arguments for who should notice."""

    file: str
    text: str
    instead: str
    tests: tuple[str, ...]


MUTATIONS: dict[str, Mutation] = {
    # losses as one op
    "a Function hides its second derivative": Mutation(
        "transforms/one_op.py", 'hasattr(node, "_forward_cls") or', "False or", (ONE_OP,)
    ),
    "a backward that is not linear": Mutation(
        "transforms/one_op.py", "if due(sizes not in self.verified) and len(losses):", "if False:", (ONE_OP,)
    ),
    "a zero times NaN": Mutation(
        "transforms/one_op.py", "if not all(bool(row.isfinite().all())", "if not all(True", (ONE_OP,)
    ),
    "positions among the channels": Mutation(
        "engine/positions.py", "2 if op in CHANNELS_FIRST else 1", "1", (POSITIONS,)
    ),
    "positions by the length of a few": Mutation(
        "engine/positions.py", "return axes if 2 * others < len(axes) else None", "return axes", (POSITIONS,)
    ),
    # layouts
    "folds swapped": Mutation("ops/layout.py", 'high = self.fold == "high"', 'high = self.fold != "high"', (LAYOUT,)),
    "one fold alone": Mutation("ops/layout.py", '= ("high", "low")', '= ("high", "high")', (LAYOUT,)),
    "first of several layouts": Mutation(
        "ops/layout.py", "return found[0] if len(found) == 1 else None", "return found[0] if found else None", (LAYOUT,)
    ),
    "silence is a layout": Mutation(
        "ops/layout.py",
        "return not any(bool(part.nan_to_num().any()) for part in parts)",
        "return False",
        (LAYOUT,),
    ),
    "any ratio agrees": Mutation(
        "ops/layout.py", "tolerance = 256 *", "tolerance = 1e14 *", (AWKWARD, "-k", "weak_term")
    ),
    "one code for all samples": Mutation(
        "ops/layout.py", "while not found or int(digits ** len(found)) < batch:", "while not found:", (LAYOUT,)
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
    # taps
    "no conjugate": Mutation(
        "engine/contributions.py",
        "slope.to(wide_dtype(slope.dtype)) * gradient.conj()",
        "slope.to(wide_dtype(slope.dtype)) * gradient",
        (AWKWARD, "-k", "complex"),
    ),
    "first output alone": Mutation(
        "engine/contributions.py",
        "torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]",
        "parts[0]",
        (AWKWARD, LAYERS, "-k", "LSTM or several"),
    ),
    "columns in their own order": Mutation(
        "engine/contributions.py",
        "in zip(self.columns, ",
        "in zip(range(len(self.columns)), ",
        (AWKWARD, "-k", "tied or norms"),
    ),
    "used after all": Mutation(
        "engine/contributions.py",
        'layout == "unused"',
        'layout == "never"',
        (AWKWARD, "-k", "used_after_all"),
    ),
    "an eager tap that is a view": Mutation(
        "engine/tap.py",
        "tuple([value.detach() for",
        "tuple([value.view_as(value) for",
        (AWKWARD, "-k", "written or convolutions"),
    ),
    "random numbers repeated once": Mutation(
        "engine/contributions.py",
        "with tapped.around():\n                slope",
        "with tapped.around() if start == needed else torch.no_grad():\n                slope",
        (MODES, "-k", "every_direction"),
    ),
    "low-rank leaves of another form": Mutation(
        "engine/tap.py",
        "tuple([tuple(map(type, known)) for known in tangents])",
        "tuple([(object,) * len(known) for known in tangents])",
        ("tests/engine/test_floor.py", "tests/engine/test_flops.py"),
    ),
    "positions forgotten for factors": Mutation(
        "engine/contributions.py", "if k not in wanted.apart and (low[k] or", "if (low[k] or", (POSITIONS,)
    ),
    "a wide product by its output": Mutation(
        "engine/contributions.py",
        "not smaller.isdisjoint(along)",
        "False",
        ("tests/engine/test_floor.py", "-k", "wide"),
    ),
    "a use that is by no product": Mutation(
        "engine/contributions.py", "cheap.issuperset(along)", "True", ("tests/engine/test_floor.py", "-k", "wide")
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
    "a sum that is of the last": Mutation(
        "engine/ledger.py",
        "total[key] = value if known is None else known + value",
        "total[key] = value",
        (REDUCERS, "-k", "added_up"),
    ),
    "zero is not one": Mutation(
        "engine/ledger.py", "scaled.get(name, zero)", "scaled.get(name, zero + 1)", (REDUCERS,)
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
    "vmapped axis left where it is": Mutation(
        "engine/tap.py",
        "values = [v if d is None else v.movedim(d, 0)",
        "values = [v if d is None else v",
        (AWKWARD, "-k", "second_of_equal"),
    ),
    # what is carried, and along which plan
    "taps alone": Mutation(
        "engine/run.py",
        "scores = scores + torch.stack(tails, -1)",
        "scores = scores + 0 * torch.stack(tails, -1)",
        (AWKWARD, "-k", "contrastive or decay"),
    ),
    "carried alone": Mutation(
        "engine/run.py",
        "scores = scores + torch.stack(tails, -1)",
        "scores = 0 * scores + torch.stack(tails, -1)",
        (AWKWARD, "-k", "carried_to_the_end"),
    ),
    "units of the reduction": Mutation(
        "engine/run.py",
        "scores = scores / cotangent.to(scores.dtype).unsqueeze(1)",
        "scores = scores * 1",
        (AWKWARD, "-k", "tied_in"),
    ),
    "the site after a checkpoint": Mutation(
        "engine/capture.py",
        "again.position, again.moving, again.maps = self.position, self.moving, self.maps",
        "again.maps = self.maps",
        (AWKWARD, CHECKPOINTS, "-k", "checkpoint"),
    ),
    "nothing forgotten": Mutation(
        "ops/values.py",
        "value is None or value.reference() is not tensor",
        "value is None",
        (CHECKPOINTS, AWKWARD, "-k", "dead or cell or follow"),
    ),
    "other draws where carried": Mutation(
        "engine/capture.py",
        "with torch.no_grad(), replaying(drawn):",
        "with torch.no_grad():",
        (AWKWARD, "-k", "noise or dropout"),
    ),
    "other draws in the backward": Mutation(
        "engine/tap.py",
        "enabled=autocast), replaying(drawn):",
        "enabled=autocast):",
        (AWKWARD, LAYERS, "-k", "noise or dropout"),
    ),
    "full precision in the backward": Mutation(
        "engine/tap.py",
        "torch.autocast(device, dtype, enabled=autocast)",
        "torch.autocast(device, dtype, enabled=False)",
        (MODES, AUTOCAST, "-k", "autocast"),
    ),
    "other ops between sites": Mutation(
        "engine/capture.py",
        "if self.digest.ops != self.plan.digest:",
        "if False:",
        (AWKWARD, "-k", "by_a_flag"),
    ),
    "zero is one": Mutation(
        "engine/contributions.py",
        "torch.zeros_like(call.leaves[slot]) if leaf is None",
        "torch.ones_like(call.leaves[slot]) if leaf is None",
        (AWKWARD, "-k", "tied or norms or recursion"),
    ),
    # samples that data move
    "moved to other places": Mutation(
        "engine/capture.py",
        "fine = torch.stack(self.as_planned).all()",
        "fine = torch.tensor(True)",
        (MOVES, AWKWARD, "-k", "anew or packed or added"),
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
    # what no mode sees
    "leaves of our own": Mutation("problem.py", "leaf if is_own(leaf) else", "leaf if False else", (UNSEEN,)),
    "gradients past an end": Mutation(
        "engine/unseen.py", "if torch._C._current_graph_task_id() == outer:", "if True:", (UNSEEN,)
    ),
    "hooks without a say": Mutation("engine/capture.py", "if is_hooked(param):", "if False:", (UNSEEN, "-k", "hook")),
    "a silent zero": Mutation(
        "planning/ways.py", "silent = bool(zero) and plain and", "silent = False and plain and", (UNSEEN,)
    ),
    # long sums
    "products in one go": Mutation(
        "algebra/sums.py",
        "return LONG if m >= FEW and n >= FEW else SHORT",
        "return 2**62",
        ("tests/algebra/test_sums.py",),
    ),
    "views are tapped": Mutation(
        "planning/sites.py",
        "if output.meter is None or bound:",
        "if output.meter is None:",
        (AWKWARD, LAYERS, "-k", "view or written or LSTM or slices"),
    ),
    # derivatives of ops
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
    # measuring
    "nothing draws": Mutation(
        "planning/trace.py",
        "drew = any(not a.equal(b)",
        "drew = any(False and not a.equal(b)",
        (AWKWARD, "-k", "noise or dropout"),
    ),
    "parameters may be written": Mutation(
        "planning/trace.py",
        "if name is not None:\n                raise",
        "if False:\n                raise",
        (LAYERS, "-k", "refused"),
    ),
    "statistics are not written": Mutation(
        "planning/trace.py",
        "            is_float(leaf)\n            and",
        "            False\n            and",
        (AWKWARD, LAYERS, MODES, "-k", "BatchNorm or batch_norm or buffers"),
    ),
    "parameters of zeros hide": Mutation(
        "planning/planner.py",
        "zero = [leaf.numel() > 0 and not bool(as_whole(leaf).any()) for leaf in leaves]",
        "zero = [False for leaf in leaves]",
        (MOVES, "-k", "gate"),
    ),
    "hidden checkpoints": Mutation(
        "planning/planner.py", "    _refuse_reentrant_checkpoints(losses)\n", "", (CHECKPOINTS, "-k", "remedy")
    ),
    "flags do not count": Mutation("ops/digest.py", "flags.append(2 + leaf)", "pass", (AWKWARD, "-k", "by_a_flag")),
    "sizes do not count": Mutation(
        "ops/digest.py", "sizes.append(leaf.shape)", "pass", (VERIFY, AWKWARD, "-k", "new_sizes")
    ),
    # factors of per-sample gradients
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
    "first row of a slice": Mutation(
        "algebra/factors.py", "(factor.index >= start)", "(factor.index > start)", (CONTRACT, "-k", "exact")
    ),
    "no law of factors": Mutation("laws/factored.py", "if wrong:", "if False:", (REDUCERS, "-k", "law_of_factors")),
    "factors of other sizes are trusted": Mutation(
        "transforms/steps.py",
        "self.due(outcome.sizes not in checked.factored)",
        "self.due(not checked.factored)",
        (PAIRS, "-k", "verified_once"),
    ),
    # compiled steps
    "what the losses read is not guarded": Mutation(
        "transforms/reading.py",
        'local["losses"].call_function(tx, [local["params"], local["batch"]], {})',
        "pass",
        (COMPILED, "-k", "vmapped_loss or mode_of"),
    ),
    "one graph for all steps": Mutation(
        "transforms/compiling.py",
        "return FunctionType(code,",
        "return FunctionType(function.__code__,",
        (COMPILED, "-k", "graphs_of_its_own"),
    ),
    "numbers of another call": Mutation(
        "transforms/reading.py",
        "not step.prepare(*whole)",
        "False",
        (COMPILED, "-k", "name_the_rows or one_size"),
    ),
    "a graph of any program": Mutation(
        "engine/capture.py",
        "if self.digest.ops != self.plan.digest:",
        "if not self.traced and self.digest.ops != self.plan.digest:",
        (COMPILED, "-k", "made_in_the_graph"),
    ),
    "samples that stay where they were": Mutation(
        "planning/planner.py",
        "if any_order and trace.result in followed.rows:",
        "if False:",
        (COMPILED, "-k", "any_order"),
    ),
    # inner products of factors
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
    "reduced at the first use": Mutation(
        "engine/ledger.py",
        "if not self.pending[number] and not self.keep",
        "if not self.keep",
        (PAIRS, "-k", "quadratic"),
    ),
    "scaled as if linear": Mutation(
        "engine/ledger.py", "self.scale**task.degree", "self.scale", (PAIRS, "-k", "quadratic")
    ),
    "axes the other way round": Mutation(
        "engine/shadows.py",
        "tuple(axes[i] for i in part)",
        "tuple(back[i] for i in part)",
        (REDUCERS, "-k", "test_op and cycled"),
    ),
    "dense axes the other way round": Mutation(
        "engine/shadows.py",
        "permute(0, *(1 + i for i in back))",
        "permute(0, *(1 + i for i in axes))",
        (REDUCERS, "-k", "test_op and cycled"),
    ),
    "activations among the sources": Mutation(
        "engine/shadows.py", "alone = all(", "alone = True or all(", (REDUCERS, "-k", "a_weight_meets")
    ),
    # reducers, directions and the head
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
    "ignored tokens have a loss": Mutation(
        "functional.py",
        "losses = torch.where(valid, losses.reshape(targets.shape), 0)",
        "losses = losses.reshape(targets.shape)",
        (HEAD, "-k", "values_and_gradients"),
    ),
    "ignored tokens are counted": Mutation(
        "functional.py",
        "losses / valid.sum(axes)",
        "losses / torch.ones_like(valid).sum(axes)",
        (HEAD, "-k", "reductions"),
    ),
    "first derivatives once for all": Mutation(
        "losses/head.py",
        "if kept and not torch.is_grad_enabled():",
        "if kept:",
        (HEAD, "-k", "hessians or second_order"),
    ),
    "a softmax without curvature": Mutation(
        "losses/chunks.py", "(q - (p * q).sum(1, keepdim=True))", "q", (HEAD, "-k", "hessians or second_order")
    ),
    # drawn values
    "layouts at the very values": Mutation(
        "planning/trace.py",
        "if self.generic and in_general",
        "if False and in_general",
        (AWKWARD, "-k", "chosen_from or starts_at_zero"),
    ),
    "what is written at the very values": Mutation(
        "planning/trace.py",
        "if self.generic is None or not writes",
        "if self.generic or not writes",
        (AWKWARD, "-k", "in_place or overwritten"),
    ),
    "another version of what is written": Mutation(
        "planning/drawn.py",
        "with _unsafe_preserve_version_counter(true):",
        "if True:",
        (AWKWARD, "-k", "in_place or overwritten"),
    ),
    "what is overwritten is gone": Mutation(
        "planning/drawn.py", "if call.op in OVERWRITES:", "if False:", (AWKWARD, "-k", "overwritten")
    ),
    # the law, and the wrappers
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
    "memory is not put back": Mutation(
        "side_effects.py", "memory.copy_(copy)", "memory.copy_(memory)", (MODES, AWKWARD, "-k", "buffers or bank")
    ),
    "directions and members swapped": Mutation(
        "transforms/lifting.py",
        "found.unflatten(1, (info.batch_size, k)), 1",
        "found.unflatten(1, (k, info.batch_size)).mT, 1",
        (LIFTING, "-k", "directions"),
    ),
    "what is not wanted stays so": Mutation(
        "planning/sites.py",
        "meter.wanted = all_of_them or id(meter) in asked",
        "meter.wanted = id(meter) in asked",
        (LAYOUT,),
    ),
    "a round of measuring is enough": Mutation(
        "planning/planner.py",
        "if not all_of_them and clock.batch and not enough_measured(trace.records, len(leaves)):",
        "if False:",
        (LAYOUT, "-k", "not_measured"),
    ),
    "one draw is enough": Mutation(
        "planning/drawn.py",
        "1 if is_multilinear(call) else 3 if few else 2 if far else 1",
        "1",
        ("tests/planning/test_drawn.py", AWKWARD),
    ),
    "losses need not repeat": Mutation(
        "planning/ways.py", "if check and seen.finite and not seen.repeats(outcome.losses):", "if False:", (VERIFY,)
    ),
    "calls of a mode's own": Mutation(
        "side_effects.py", "with torch._C.DisableTorchFunction():", "if True:", (VERIFY,)
    ),
    "other draws for a derivative": Mutation(
        "transforms/lifting.py",
        """            with untouched(self.problem.devices()), replaying(self.drawn):
                losses""",
        """            with untouched(self.problem.devices()):
                losses""",
        (LIFTING, "-k", "dropout"),
    ),
    "derivatives of unweighted losses": Mutation(
        "transforms/lifting.py",
        "column = column.to(losses.dtype)",
        "column = torch.ones_like(losses)",
        (LIFTING, "-k", "transforms"),
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
    "heads in place of examples": Mutation(
        "losses/batching.py",
        "if axis is None else operand.movedim(axis, 0)",
        "if axis is None else operand",
        (EXAMPLE,),
    ),
    "every chunk is the first": Mutation(
        "losses/examples.py", "leaf.narrow(axis, start, count)", "leaf.narrow(axis, 0, count)", (EXAMPLE, "-k", "chunk")
    ),
}


def run(folder: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails in a folder, None where all pass."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "HYPOTHESIS_PROFILE": "ci", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *tests]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if found.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", found.stdout, re.MULTILINE)
    if found.returncode != 1 or failed is None:
        raise RuntimeError(f"pytest ended with {found.returncode}: {found.stdout[-2000:]}{found.stderr[-2000:]}")
    return failed[1]


def outcomes(names: Sequence[str], folder: Path) -> Iterator[tuple[str, str, bool]]:
    """For each mutation what came of it, and whether that is as it should be."""
    sound: dict[tuple[str, ...], str | None] = {}
    for name in names:
        file, text, instead, tests = MUTATIONS[name]
        path = folder / "funcghost" / file
        source = path.read_text(encoding="utf-8")
        if source.count(text) != 1:
            yield name, f"its text stands {source.count(text)} times in {file}", False
            continue
        if tests not in sound:
            sound[tests] = run(folder, tests)
        if sound[tests] is not None:
            yield name, f"{sound[tests]} fails without it", False
            continue
        path.write_text(source.replace(text, instead), encoding="utf-8")
        killer = run(folder, tests)
        path.write_text(source, encoding="utf-8")
        yield name, f"killed by {killer}" if killer else "SURVIVED", killer is not None


def main(names: Sequence[str]) -> int:
    """Runs the mutations of these names, or all."""
    if unknown := set(names) - MUTATIONS.keys():
        print(f"no mutations {sorted(unknown)} among {sorted(MUTATIONS)}")
        return 2
    fine = True
    with tempfile.TemporaryDirectory() as made:
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, Path(made) / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / part, made)
        for name, outcome, expected in outcomes(names or list(MUTATIONS), Path(made)):
            fine = fine and expected
            print(f"{name:32} {outcome}", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
