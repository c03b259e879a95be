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
        "planning/ways.py",
        "Rehearsal.choose.evaluate",
        "silent = bool(zero) and plain and backward_sees(call, saved, tangents)",
        "silent = False and plain and backward_sees(call, saved, tangents)",
        (UNSEEN,),
    ),
    "views are tapped": Mutation(
        "planning/sites.py",
        "output_layout",
        "output.meter is None or bound",
        "output.meter is None",
        (AWKWARD, LAYERS, "-k", "view or written or LSTM or slices"),
    ),
    "nothing draws": Mutation(
        "planning/trace.py",
        "Trace.visit",
        "not a.equal(b)",
        "False",
        (AWKWARD, "-k", "noise or dropout"),
    ),
    "parameters may be written": Mutation(
        "planning/trace.py",
        "Trace._refuse_writes",
        "self.memory.get(storage_of(value))",
        "None",
        (LAYERS, "-k", "refused"),
    ),
    "statistics are not written": Mutation(
        "planning/trace.py",
        "Trace._may_be_statistics",
        "leaf.dim() == 1",
        "False",
        (AWKWARD, LAYERS, MODES, "-k", "BatchNorm or batch_norm or buffers"),
    ),
    "parameters of zeros hide": Mutation(
        "planning/planner.py",
        "without_zeros",
        "zero = [leaf.numel() > 0 and not _has_any(as_whole(leaf)) for leaf in leaves]",
        "zero = [False for leaf in leaves]",
        (MOVES, "-k", "gate"),
    ),
    "hidden checkpoints": Mutation(
        "planning/planner.py",
        "_observe",
        "_refuse_reentrant_checkpoints(losses)",
        "None",
        (CHECKPOINTS, "-k", "remedy"),
    ),
    "samples that stay where they were": Mutation(
        "planning/planner.py",
        "_decide",
        "any_order and trace.result in followed.rows",
        "False",
        (COMPILED, "-k", "any_order"),
    ),
    "layouts at the very values": Mutation(
        "planning/trace.py",
        "Trace._record",
        "self.generic and in_general and not fixed and (call.written or not bound)",
        "False",
        (AWKWARD, "-k", "chosen_from or starts_at_zero"),
    ),
    "what is written at the very values": Mutation(
        "planning/trace.py",
        "Trace._before_a_write",
        "if self.generic is None or not writes or len(fixed) == len(inputs):\n    return None",
        "if self.generic or not writes or len(fixed) == len(inputs):\n    return None",
        (AWKWARD, "-k", "in_place or overwritten"),
    ),
    "another version of what is written": Mutation(
        "planning/drawn.py",
        "Generic._back",
        "_unsafe_preserve_version_counter(true)",
        "torch.set_grad_enabled(torch.is_grad_enabled())",
        (AWKWARD, "-k", "in_place or overwritten"),
    ),
    "what is overwritten is gone": Mutation(
        "planning/drawn.py", "Generic.outputs", "call.op in OVERWRITES", "False", (AWKWARD, "-k", "overwritten")
    ),
    "what is not wanted stays so": Mutation(
        "planning/sites.py",
        "want_meters",
        "meter.wanted = all_of_them or id(meter) in asked",
        "meter.wanted = id(meter) in asked",
        (LAYOUT,),
    ),
    "a round of measuring is enough": Mutation(
        "planning/planner.py",
        "_observe",
        "not all_of_them and clock.batch and not enough_measured(trace.records, len(leaves))",
        "False",
        (LAYOUT, "-k", "not_measured"),
    ),
    "one draw is enough": Mutation(
        "planning/drawn.py",
        "Generic.outputs",
        "1 if is_multilinear(call) else 3 if few else 2 if far else 1",
        "1",
        ("tests/planning/test_drawn.py", AWKWARD),
    ),
    "losses need not repeat": Mutation(
        "planning/ways.py",
        "Rehearsal.run.scores",
        "check and seen.finite and not seen.repeats(outcome.losses)",
        "False",
        (VERIFY,),
    ),
}
