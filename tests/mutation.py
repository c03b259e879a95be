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

LAYOUT, MOVES, RULES, VERIFY = (f"tests/test_{name}.py" for name in ("layout", "moves", "rules", "verify"))
MODES, WRAPPERS, EXAMPLE = (f"tests/test_{name}.py" for name in ("modes", "wrappers", "per_example"))
AWKWARD, LAYERS = "tests/test_awkward.py", "tests/test_nn_layers.py"


class Mutation(NamedTuple):
    """`text` in a file of the package becomes `instead`; `tests` are pytest's arguments for who should notice."""

    file: str
    text: str
    instead: str
    tests: tuple[str, ...]


MUTATIONS: dict[str, Mutation] = {
    # layouts
    "folds swapped": Mutation("layout.py", 'high = self.fold == "high"', 'high = self.fold != "high"', (LAYOUT,)),
    "one fold alone": Mutation("layout.py", '= ("high", "low")', '= ("high", "high")', (LAYOUT,)),
    "first of several layouts": Mutation(
        "layout.py", "return found[0] if len(found) == 1 else None", "return found[0] if found else None", (LAYOUT,)
    ),
    "silence is a layout": Mutation(
        "layout.py",
        "return not any(bool(part.nan_to_num().any()) for part in parts)",
        "return False",
        (LAYOUT,),
    ),
    "any ratio agrees": Mutation("layout.py", "tolerance = 256 *", "tolerance = 1e14 *", (AWKWARD, "-k", "weak_term")),
    "one code for all samples": Mutation(
        "layout.py", "while not found or int(DIGITS ** len(found)) < batch:", "while not found:", (LAYOUT,)
    ),
    "rows overwritten": Mutation(
        "layout.py", "index_add(0, self.samples, rows)", "index_copy(0, self.samples, rows)", (MOVES,)
    ),
    "a layout that need not fit": Mutation(
        "layout.py",
        'return size == batch if self.fold == "whole" else size % batch == 0',
        "return True",
        (LAYOUT, MOVES, AWKWARD, "-k", "fits or follow"),
    ),
    # taps
    "no conjugate": Mutation(
        "tap.py", "slope.to(wide) * gradient.conj()", "slope.to(wide) * gradient", (AWKWARD, "-k", "complex")
    ),
    "first output alone": Mutation(
        "tap.py",
        "torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]",
        "parts[0]",
        (AWKWARD, LAYERS, "-k", "LSTM or several"),
    ),
    "columns in their own order": Mutation(
        "tap.py",
        "dict(zip(self.columns, columns, strict=True))",
        "dict(enumerate(columns))",
        (AWKWARD, "-k", "tied or norms"),
    ),
    "used after all": Mutation(
        "tap.py",
        'if any(g is not None and layout == "unused"',
        'if any(False and layout == "unused"',
        (AWKWARD, "-k", "used_after_all"),
    ),
    "a tap that is a view": Mutation(
        "tap.py",
        "torch.ops.aten._unsafe_view(value, value.shape)",
        "value.view_as(value)",
        (AWKWARD, "-k", "convolutions or written"),
    ),
    "vmapped axis left where it is": Mutation(
        "tap.py",
        "values = [v if d is None else v.movedim(d, 0)",
        "values = [v if d is None else v",
        (AWKWARD, "-k", "second_of_equal"),
    ),
    # what is carried, and along which plan
    "taps alone": Mutation(
        "run.py",
        "scores = scores + torch.stack(tails, -1)",
        "scores = scores + 0 * torch.stack(tails, -1)",
        (AWKWARD, "-k", "contrastive or decay"),
    ),
    "carried alone": Mutation(
        "run.py",
        "scores = scores + torch.stack(tails, -1)",
        "scores = 0 * scores + torch.stack(tails, -1)",
        (AWKWARD, "-k", "carried_to_the_end"),
    ),
    "units of the reduction": Mutation(
        "run.py",
        "scores = scores / cotangent.to(scores.dtype).unsqueeze(1)",
        "scores = scores * 1",
        (AWKWARD, "-k", "tied_in"),
    ),
    "the site after a checkpoint": Mutation(
        "capture.py",
        "again.position, again.calls, again.maps = self.position, self.calls, self.maps",
        "again.maps = self.maps",
        (AWKWARD, WRAPPERS, "-k", "checkpoint"),
    ),
    "nothing forgotten": Mutation(
        "capture.py",
        "tangents.pop(key, None)",
        "tangents.get(key)",
        (WRAPPERS, AWKWARD, "-k", "dead or cell or follow"),
    ),
    "other draws where carried": Mutation(
        "capture.py",
        "with torch.no_grad(), replaying(drawn):",
        "with torch.no_grad():",
        (AWKWARD, "-k", "noise or dropout"),
    ),
    "other draws in the backward": Mutation(
        "capture.py",
        "enabled=autocast), replaying(drawn):",
        "enabled=autocast):",
        (AWKWARD, LAYERS, "-k", "noise or dropout"),
    ),
    "full precision in the backward": Mutation(
        "capture.py",
        "torch.autocast(device, dtype, enabled=autocast)",
        "torch.autocast(device, dtype, enabled=False)",
        (MODES, WRAPPERS, "-k", "autocast"),
    ),
    "other ops between sites": Mutation(
        "capture.py",
        "if not self.traced and self.digest.ops != self.plan.digest:",
        "if False:",
        (AWKWARD, "-k", "by_a_flag"),
    ),
    "zero is one": Mutation(
        "capture.py",
        "torch.zeros_like(call.leaves[slot]) if tangent is None",
        "torch.ones_like(call.leaves[slot]) if tangent is None",
        (AWKWARD, "-k", "tied or norms or recursion"),
    ),
    # samples that data move
    "moved to other places": Mutation(
        "capture.py",
        "fine = torch.stack(self.as_planned).all()",
        "fine = torch.tensor(True)",
        (MOVES, AWKWARD, "-k", "anew or packed or added"),
    ),
    "sums of samples are pure": Mutation(
        "moves.py",
        "return (self.squares * self.number == self.total.square()).all()",
        "return self.total.new_ones(()) > 0",
        (MOVES,),
    ),
    "nothing moves by data": Mutation(
        "moves.py",
        "return any(other is None or not _same(plain, other) for other in shuffled)",
        "return False",
        (MOVES, AWKWARD, "-k", "packed or route or anew"),
    ),
    "any place is the planned one": Mutation(
        "moves.py",
        "((samples == expected) | (sources.number == 0)).all()",
        "(samples == samples).all()",
        (MOVES, AWKWARD, "-k", "packed or added or anew"),
    ),
    "what a custom function hides": Mutation(
        "sites.py", "if note.unseen and note.by_data", "if False", (AWKWARD, "-k", "after_a_custom")
    ),
    "views are tapped": Mutation(
        "sites.py",
        "if output.meter is None or bound:",
        "if output.meter is None:",
        (AWKWARD, LAYERS, "-k", "view or written or LSTM or slices"),
    ),
    # derivatives of ops
    "one factor of a product": Mutation(
        "tangent.py",
        "return [((slot,), ()) for slot in call.tracked]",
        "return [((slot,), ()) for slot in call.tracked[:1]]",
        (RULES, AWKWARD, "-k", "disguise or outer"),
    ),
    "a bias twice": Mutation(
        "tangent.py", "values.update({slot: zero(slot) for slot in empty})", "values.update({})", (RULES,)
    ),
    "the forward of an embedding": Mutation(
        "tangent.py", "if rule.factor else None", "if False else None", (LAYERS, "-k", "Embedding")
    ),
    "in place on what is kept": Mutation(
        "tangent.py",
        "copied[slot] = copied[slot].clone()",
        "copied[slot] = copied[slot]",
        (AWKWARD, "-k", "written or added"),
    ),
    "only the padding": Mutation("rules.py", "(index != padding)", "(index == padding)", (LAYERS, "-k", "Embedding")),
    "frequency upside down": Mutation(
        "rules.py",
        "return 1 / count if factor",
        "return count if factor",
        (LAYERS, RULES, "-k", "Embedding or embedding"),
    ),
    "a maximum is linear": Mutation(
        "rules.py", 'return a.get("mode", "mean") != "max" and', "return", (LAYERS, "-k", "refused")
    ),
    # measuring
    "nothing draws": Mutation(
        "trace.py",
        "drew = any(not a.equal(b)",
        "drew = any(False and not a.equal(b)",
        (AWKWARD, "-k", "noise or dropout"),
    ),
    "parameters may be written": Mutation(
        "trace.py",
        "if name is not None:\n                raise",
        "if False:\n                raise",
        (LAYERS, "-k", "refused"),
    ),
    "statistics are not written": Mutation(
        "trace.py",
        "            is_float(leaf)\n            and",
        "            False\n            and",
        (AWKWARD, LAYERS, MODES, "-k", "BatchNorm or batch_norm or buffers"),
    ),
    "parameters of zeros hide": Mutation(
        "planning.py",
        "zero = [leaf.numel() > 0 and not bool(leaf.any()) for leaf in leaves]",
        "zero = [False for leaf in leaves]",
        (MOVES, "-k", "gate"),
    ),
    "hidden checkpoints": Mutation(
        "planning.py", "    _refuse_reentrant_checkpoints(losses)\n", "", (WRAPPERS, "-k", "remedy")
    ),
    "flags do not count": Mutation("digest.py", "flags.append(2 + leaf)", "pass", (AWKWARD, "-k", "by_a_flag")),
    "sizes do not count": Mutation(
        "digest.py", "sizes.append(leaf.shape)", "pass", (VERIFY, AWKWARD, "-k", "new_sizes")
    ),
    # the law, and the wrappers
    "no law": Mutation(
        "verify.py",
        "if not abs(ours - wanted) <= seen.tolerance * scale:",
        "if False:",
        (AWKWARD, "-k", "hidden or view or vmap"),
    ),
    "small gradients vanish": Mutation(
        "verify.py", "boost = min(largest / max(norm, 1e-30), 1e3)", "boost = min(1.0, 1e3)", (VERIFY, "-k", "missed")
    ),
    "memory is not put back": Mutation(
        "state.py", "storage.copy_(copy)", "storage.copy_(storage)", (MODES, AWKWARD, "-k", "buffers or bank")
    ),
    "directions and members swapped": Mutation(
        "lifting.py",
        "found.unflatten(1, (info.batch_size, k)), 1",
        "found.unflatten(1, (k, info.batch_size)).mT, 1",
        (WRAPPERS, "-k", "directions"),
    ),
    "heads in place of examples": Mutation(
        "batching.py", "if axis is None else operand.movedim(axis, 0)", "if axis is None else operand", (EXAMPLE,)
    ),
    "every chunk is the first": Mutation(
        "losses.py", "leaf.narrow(axis, start, count)", "leaf.narrow(axis, 0, count)", (EXAMPLE, "-k", "chunk")
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
