"""What the tests of this wing must notice."""

from tests.mutation import Mutation

AUTOCAST = "tests/engine/test_mixed_precision.py"
AWKWARD = "tests/engine/test_awkward.py"
CHECKPOINTS = "tests/engine/test_checkpointing.py"
COMPILED = "tests/transforms/test_compiled.py"
LAYERS = "tests/engine/test_nn_layers.py"
MODES = "tests/engine/test_modes.py"
MOVES = "tests/ops/test_moves.py"
PAIRS = "tests/algebra/test_pairs.py"
POSITIONS = "tests/reducers/test_positions.py"
SIZES = "tests/transforms/test_sizes.py"
REDUCERS = "tests/reducers/test_reducers.py"
SUMMING = "tests/engine/test_summing.py"
UNSEEN = "tests/engine/test_unseen.py"

MUTATIONS: dict[str, Mutation] = {
    "the mean over samples for their sum": Mutation(
        "engine/ledger.py", "Ledger._reduce", "gradients.sum(0)", "gradients.mean(0)", (SUMMING,)
    ),
    "sums past a hook": Mutation("engine/summing.py", "_is_plain", "not is_hooked(leaf)", "True", (SUMMING,)),
    "positions among the channels": Mutation(
        "engine/positions.py", "Positions.see", "2 if op in CHANNELS_FIRST else 1", "1", (POSITIONS,)
    ),
    "positions by the length of a few": Mutation(
        "engine/positions.py",
        "Positions._of_length",
        "return axes if 2 * others < len(axes) else None",
        "return axes",
        (POSITIONS,),
    ),
    "no conjugate": Mutation(
        "engine/contributions.py",
        "terms_of",
        "slope.to(wide_dtype(slope.dtype)) * gradient.conj()",
        "slope.to(wide_dtype(slope.dtype)) * gradient",
        (AWKWARD, "-k", "complex"),
    ),
    "first output alone": Mutation(
        "engine/contributions.py",
        "ByTangents.contribute",
        "torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]",
        "parts[0]",
        (AWKWARD, LAYERS, "-k", "LSTM or several"),
    ),
    "columns in their own order": Mutation(
        "engine/contributions.py",
        "ByTangents.contribute",
        "zip(self.columns, slopes(*kept), strict=True)",
        "zip(range(len(self.columns)), slopes(*kept), strict=True)",
        (AWKWARD, "-k", "tied or norms"),
    ),
    "used after all": Mutation(
        "engine/contributions.py",
        "Tapped._used",
        'layout == "unused"',
        'layout == "never"',
        (AWKWARD, "-k", "used_after_all"),
    ),
    "an eager tap that is a view": Mutation(
        "engine/tap.py",
        "EagerTap.forward",
        "tuple([detach_as_placed(value) for value in values])",
        "tuple([value.view_as(value) for value in values])",
        (AWKWARD, "-k", "written or convolutions"),
    ),
    "random numbers repeated once": Mutation(
        "engine/contributions.py",
        "ByTangents._slopes",
        "tapped.around()",
        "tapped.around() if start == needed else torch.no_grad()",
        (MODES, "-k", "every_direction"),
    ),
    "low-rank leaves of another form": Mutation(
        "engine/tap.py",
        "Taps.put",
        "tuple([tuple(map(type, known)) for known in tangents])",
        "tuple([(object,) * len(known) for known in tangents])",
        ("tests/engine/test_floor.py", "tests/engine/test_flops.py"),
    ),
    "positions forgotten for factors": Mutation(
        "engine/recipes.py",
        "_by_factors",
        "k not in wanted.apart and (low[k] or (cheap.issuperset(along) and not smaller.isdisjoint(along)))",
        "True and (low[k] or (cheap.issuperset(along) and not smaller.isdisjoint(along)))",
        (POSITIONS,),
    ),
    "a wide product by its output": Mutation(
        "engine/recipes.py",
        "_by_factors",
        "not smaller.isdisjoint(along)",
        "False",
        ("tests/engine/test_floor.py", "-k", "wide"),
    ),
    "a use that is by no product": Mutation(
        "engine/recipes.py",
        "_by_factors",
        "cheap.issuperset(along)",
        "True",
        ("tests/engine/test_floor.py", "-k", "wide"),
    ),
    "a sum that is of the last": Mutation(
        "engine/ledger.py",
        "Ledger._contribute",
        "total[key] = value if known is None else known + value",
        "total[key] = value",
        (REDUCERS, "-k", "added_up"),
    ),
    "zero is not one": Mutation(
        "engine/ledger.py", "Ledger.results", "scaled.get(name, zero)", "scaled.get(name, zero + 1)", (REDUCERS,)
    ),
    "vmapped axis left where it is": Mutation(
        "engine/tap.py",
        "Tap.vmap",
        "values = [v if d is None else v.movedim(d, 0) for v, d in zip(tensors, dims, strict=True)]",
        "values = [v if d is None else v for v, d in zip(tensors, dims, strict=True)]",
        (AWKWARD, "-k", "second_of_equal"),
    ),
    "taps alone": Mutation(
        "engine/run.py",
        "run",
        "scores = scores + torch.stack(tails, -1).to(scores.dtype)",
        "scores = scores + 0 * torch.stack(tails, -1).to(scores.dtype)",
        (AWKWARD, "-k", "contrastive or decay"),
    ),
    "carried alone": Mutation(
        "engine/run.py",
        "run",
        "scores = scores + torch.stack(tails, -1).to(scores.dtype)",
        "scores = 0 * scores + torch.stack(tails, -1).to(scores.dtype)",
        (AWKWARD, "-k", "carried_to_the_end"),
    ),
    "units of the reduction": Mutation(
        "engine/run.py",
        "run",
        "scores = scores / cotangent.to(scores.dtype).unsqueeze(1)",
        "scores = scores * 1",
        (AWKWARD, "-k", "tied_in"),
    ),
    "the site after a checkpoint": Mutation(
        "engine/capture.py",
        "Capture.resumed",
        "again.position, again.moving, again.maps = self.position, self.moving, self.maps",
        "again.maps = self.maps",
        (AWKWARD, CHECKPOINTS, "-k", "checkpoint"),
    ),
    "other draws where carried": Mutation(
        "engine/capture.py",
        "Capture._carry",
        "with torch.no_grad(), replaying(drawn):\n    slopes.append(push.evaluate(saved, filled(call, tangents, k)))",
        "with torch.no_grad():\n    slopes.append(push.evaluate(saved, filled(call, tangents, k)))",
        (AWKWARD, "-k", "noise or dropout"),
    ),
    "other draws in the backward": Mutation(
        "engine/tap.py",
        "ambient.around",
        "with torch.autocast(device, dtype, enabled=autocast), replaying(drawn):\n    yield",
        "with torch.autocast(device, dtype, enabled=autocast):\n    yield",
        (AWKWARD, LAYERS, "-k", "noise or dropout"),
    ),
    "full precision in the backward": Mutation(
        "engine/tap.py",
        "ambient.around",
        "torch.autocast(device, dtype, enabled=autocast)",
        "torch.autocast(device, dtype, enabled=False)",
        (MODES, AUTOCAST, "-k", "autocast"),
    ),
    "other ops between sites": Mutation(
        "engine/capture.py",
        "Capture.finish",
        "self.digest.ops != self.plan.digest",
        "False",
        (AWKWARD, "-k", "by_a_flag"),
    ),
    "zero is one": Mutation(
        "engine/contributions.py",
        "filled",
        "torch.zeros_like(call.leaves[slot]) if leaf is None else as_dense(leaf)",
        "torch.ones_like(call.leaves[slot]) if leaf is None else as_dense(leaf)",
        (AWKWARD, "-k", "tied or norms or recursion"),
    ),
    "moved to other places": Mutation(
        "engine/capture.py",
        "Capture.check_moves",
        "fine = torch.stack(self.as_planned).all()",
        "fine = torch.tensor(True)",
        (MOVES, AWKWARD, "-k", "anew or packed or added"),
    ),
    "a derivative comes from its arguments": Mutation(
        "engine/walker.py", "Walker.__torch_function__", "op in DERIVATIVES", "False", (UNSEEN, "-k", "inside")
    ),
    "gradients past an end": Mutation(
        "engine/unseen.py", "_stop", "torch._C._current_graph_task_id() == outer", "True", (UNSEEN,)
    ),
    "hooks without a say": Mutation(
        "engine/capture.py", "Capture._follow", "is_hooked(param)", "False", (UNSEEN, "-k", "hook")
    ),
    "a graph of any program": Mutation(
        "engine/capture.py",
        "Capture.finish",
        "self.digest.ops != self.plan.digest",
        "not self.traced and self.digest.ops != self.plan.digest",
        (COMPILED, "-k", "made_in_the_graph"),
    ),
    "reduced at the first use": Mutation(
        "engine/ledger.py",
        "Ledger.passed",
        "if not self.pending[number] and not self.keep:\n    self._reduce(number)",
        "if not self.keep:\n    self._reduce(number)",
        (PAIRS, "-k", "quadratic"),
    ),
    "scaled as if linear": Mutation(
        "engine/ledger.py", "Ledger.results", "self.scale**task.degree", "self.scale", (PAIRS, "-k", "quadratic")
    ),
    "axes the other way round": Mutation(
        "engine/shadows.py",
        "permuted",
        "tuple(axes[i] for i in part)",
        "tuple(back[i] for i in part)",
        (REDUCERS, "-k", "test_op and cycled"),
    ),
    "dense axes the other way round": Mutation(
        "engine/shadows.py",
        "permuted",
        "factor.value.permute(0, *(1 + i for i in back))",
        "factor.value.permute(0, *(1 + i for i in axes))",
        (REDUCERS, "-k", "test_op and cycled"),
    ),
    "activations among the sources": Mutation(
        "engine/shadows.py",
        "followed",
        "slot in call.tracked or not (isinstance(leaf, Tensor) and leaf.requires_grad)",
        "True",
        (REDUCERS, "-k", "a_weight_meets"),
    ),
    "one size says of all": Mutation(
        "engine/verified.py",
        "Verified.implies",
        "return self.confirmed and bool(many & (many - 1)) and self._alike(sizes) and not self._off(sizes).any()",
        "return bool(many & (many - 1)) and self._alike(sizes) and not self._off(sizes).any()",
        (SIZES, "-k", "three_sizes"),
    ),
    "sizes off the hull follow": Mutation(
        "engine/verified.py",
        "Verified.implies",
        "self.confirmed and bool(many & (many - 1)) and self._alike(sizes) and not self._off(sizes).any()",
        "self.confirmed and bool(many & (many - 1)) and self._alike(sizes)",
        (SIZES, "-k", "affine"),
    ),
}
