"""What the tests of this wing must notice."""

from tests.mutation import Mutation

AWKWARD = "tests/engine/test_awkward.py"
CHECKPOINTS = "tests/engine/test_checkpointing.py"
COMPILED = "tests/transforms/test_compiled.py"
LAYERS = "tests/engine/test_nn_layers.py"
LAYOUT = "tests/ops/test_layout.py"
MODES = "tests/engine/test_modes.py"
MOVES = "tests/ops/test_moves.py"
UNSEEN = "tests/engine/test_unseen.py"
VERIFY = "tests/laws/test_conservation.py"

MUTATIONS: dict[str, Mutation] = {
    "a silent zero": Mutation(
        "planning/ways.py", "silent = bool(zero) and plain and", "silent = False and plain and", (UNSEEN,)
    ),
    "views are tapped": Mutation(
        "planning/sites.py",
        "if output.meter is None or bound:",
        "if output.meter is None:",
        (AWKWARD, LAYERS, "-k", "view or written or LSTM or slices"),
    ),
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
        "zero = [leaf.numel() > 0 and not _has_any(as_whole(leaf)) for leaf in leaves]",
        "zero = [False for leaf in leaves]",
        (MOVES, "-k", "gate"),
    ),
    "hidden checkpoints": Mutation(
        "planning/planner.py", "    _refuse_reentrant_checkpoints(losses)\n", "", (CHECKPOINTS, "-k", "remedy")
    ),
    "samples that stay where they were": Mutation(
        "planning/planner.py",
        "if any_order and trace.result in followed.rows:",
        "if False:",
        (COMPILED, "-k", "any_order"),
    ),
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
}
