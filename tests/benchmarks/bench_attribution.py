"""Attribution beside kronfluence, dattri, captum, curvlinops and trak: the same model, data and damping, side by side.

    python tests/benchmarks/bench_attribution.py --quick

Contenders take turns; a ratio is that of CPU time in the same round, and the median over rounds is printed. Results are
compared before anything is timed. A library that is missing is a row that says so:

    pip install kronfluence==1.0.1 dattri==0.3.0 traker==0.3.2 captum==0.9.0 curvlinops-for-pytorch==3.0.1

The sweep of unrolled attribution is held to plain training steps of the same loop.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from funcghost.attribution import curvature, gradient, matrix_free, projected, unrolled
from funcghost.attribution.against import against
from funcghost.evaluation.tables import spearman
from tests.benchmarks import attribution_contenders as peers
from tests.benchmarks.attribution_contenders import Problem, criterion, problems, quiet
from tests.benchmarks.common import describe, parser_of, positive, table

BATCH = {"mlp": 100, "gpt": 16}


@dataclass
class Row:
    """What was measured: `off` is the largest difference relative to the largest entry, `ratio` ours / theirs."""

    what: str
    against: str
    ratio: float | None = None
    aim: float | None = None
    off: float | None = None
    note: str = ""


def seconds(run: Callable[[], Any]) -> float:
    """Of this process's CPU time: other work on the machine does not count."""
    start = time.process_time()
    with quiet():
        run()
    return time.process_time() - start


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> float:
    """The median over rounds of ours / theirs, in turns, after one of each."""
    seconds(ours), seconds(theirs)
    return median(seconds(ours) / seconds(theirs) for _ in range(rounds))


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def ekfac(problem: Problem, rounds: int) -> Row:
    """Factors and all scores."""
    batches = problem.batches(BATCH[problem.name])

    def ours() -> Tensor:
        made = curvature.ekfac(problem.losses, problem.params, batches).damped(fraction=0.1)
        directions = made(gradient.query_gradients(problem.losses)(problem.params, problem.queries))
        return against(problem.losses)(problem.params, batches, directions)

    row = Row(f"EK-FAC, {problem.name}", "kronfluence", aim=0.5)
    with quiet():
        theirs = peers.kronfluence(problem, BATCH[problem.name])
        row.off = off(ours(), theirs().T)
    row.ratio = ratio(ours, theirs, rounds)
    return row


def conjugate(problem: Problem, rounds: int, damping: float, steps: int) -> Row:
    """`(H + damping)^-1 v` for 20 queries, to the residual that dattri has after so many steps."""
    some = 20
    tree = gradient.query_gradients(problem.losses)(problem.params, tuple(own[:some] for own in problem.queries))
    product = matrix_free.hessian(problem.losses, problem.params, [problem.train])
    flat = torch.cat([tree[name].flatten(1) for name in problem.params], 1)
    row = Row(f"conjugate gradients, {problem.name}", "dattri", aim=0.3)
    with quiet():
        theirs = peers.dattri(problem, damping, steps)
        found = theirs(flat)
    parts = found.split([leaf.numel() for leaf in problem.params.values()], 1)
    solution = {n: part.view(some, *leaf.shape) for (n, leaf), part in zip(problem.params.items(), parts, strict=True)}
    back = product(solution)
    left = torch.cat([(back[n] + damping * solution[n] - tree[n]).flatten(1) for n in problem.params], 1)
    residual = float((left.norm(dim=1) / flat.norm(dim=1)).max())

    def ours() -> Any:
        product = matrix_free.hessian(problem.losses, problem.params, [problem.train], hold=True)
        return matrix_free.conjugate_gradients(product, damping, tolerance=max(residual, 1e-6)).solve(tree)

    with quiet():
        mine = ours()
    row.off = off(torch.cat([mine.direction[n].flatten(1) for n in problem.params], 1), found)
    row.ratio = ratio(ours, lambda: theirs(flat), rounds)
    row.note = f"damping {damping}, residual {max(residual, 1e-6):.1e} both; {mine.steps} steps of {steps}"
    return row


def tracin(problem: Problem, rounds: int) -> Row:
    """Products of all samples with all queries."""
    batches = problem.batches(BATCH[problem.name])
    row = Row(f"TracIn, {problem.name}", "captum")

    score = gradient.dot(problem.losses)

    def ours() -> Tensor:
        return score(problem.params, batches, [problem.queries])

    with quiet():
        theirs = peers.captum(problem, BATCH[problem.name])
        row.off = off(ours(), theirs().T)
    row.ratio = ratio(ours, theirs, rounds)
    return row


def gauss_newton(problem: Problem, rounds: int) -> Row:
    """The matrix times 20 vectors."""
    names = list(problem.params)
    v = {n: torch.randn(20, *leaf.shape) for n, leaf in problem.params.items()}
    flat = torch.cat([v[n].flatten(1) for n in names], 1).T
    batches = problem.batches(BATCH[problem.name])
    row = Row(f"Gauss-Newton product, {problem.name}", "curvlinops")

    def ours() -> Any:
        return matrix_free.gauss_newton(problem.outputs, criterion, problem.params, batches)(v)

    with quiet():
        theirs = peers.curvlinops(problem, BATCH[problem.name])
        found = ours()
        row.off = off(torch.cat([found[n].flatten(1) for n in names], 1).T, theirs(flat))
    row.ratio = ratio(ours, lambda: theirs(flat), rounds)
    return row


def trak(problem: Problem, rounds: int) -> Row:
    """One model, 256 dimensions: ranks are compared, since projections and scales are others."""
    batches = problem.batches(BATCH[problem.name])
    row = Row(f"TRAK, {problem.name}", "trak")

    def ours() -> Tensor:
        return projected.trak(problem.losses, 256, damping=1e-3)([problem.params], batches, [problem.queries])

    with quiet():
        theirs = peers.trak(problem, BATCH[problem.name], 256)
        agreement = float(spearman(ours().double(), theirs().double()).mean())
    row.ratio, row.note = ratio(ours, theirs, rounds), f"rank correlation by query {agreement:.3f}"
    return row


def sweep(problem: Problem, rounds: int, k: int) -> Row:
    """One step of the reverse sweep, for k queries, in plain steps of the same training.

    The derivative of the query and the look at the first step's dtypes are paid once: a training is long.
    """
    size, steps = (32, 60) if problem.name == "mlp" else (16, 24)
    batches = (problem.batches(size) * steps)[:steps]

    def update(params: Any, grads: Any, state: Any) -> Any:
        return {n: p - 0.01 * grads[n] for n, p in params.items()}, state

    def query(params: Any) -> Tensor:
        x, labels = (own[: max(k, 2)] for own in problem.queries)
        found = problem.losses(params, (x, labels))
        return found.mean() if k == 1 else found.repeat(-(-k // len(found)))[:k]

    def plain() -> Any:
        params = problem.params
        for batch in batches:
            leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
            grads = torch.autograd.grad(problem.losses(leaves, batch).mean(), list(leaves.values()))
            params = update(params, dict(zip(leaves, grads, strict=True)), None)[0]

    def ours() -> Any:
        return unrolled.attribute(problem.losses, update, problem.params, {}, batches, query)

    whole = ratio(ours, plain, rounds) - 1  # the training itself is a plain step for each
    aim = 3.4 if k == 1 else 1.6
    return Row(f"reverse sweep, {k} queries, {problem.name}", "plain steps", ratio=whole / k, aim=aim, note="per query")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the benchmark; its rows."""
    parser = parser_of(__doc__, quick="three rounds")
    parser.add_argument("--rounds", type=positive(int), default=9)
    parser.add_argument("--threads", type=positive(int), default=1)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rounds = 3 if args.quick else args.rounds
    mlp, gpt, linear = problems()
    cases: list[tuple[str, Callable[[], Row]]] = [
        ("EK-FAC, mlp", lambda: ekfac(mlp, rounds)),
        ("EK-FAC, gpt", lambda: ekfac(gpt, rounds)),
        ("conjugate gradients, mlp", lambda: conjugate(mlp, rounds, 1.0, 10)),
        ("conjugate gradients, linear", lambda: conjugate(linear, rounds, 0.01, 40)),
        ("TracIn, mlp", lambda: tracin(mlp, rounds)),
        ("Gauss-Newton product, mlp", lambda: gauss_newton(mlp, rounds)),
        ("TRAK, mlp", lambda: trak(mlp, rounds)),
        *((f"reverse sweep, {p.name}", lambda p=p, k=k: sweep(p, rounds, k)) for p in (mlp, gpt) for k in (1, 16)),
    ]
    rows = []
    for name, case in cases:
        if args.only not in name:
            continue
        try:
            rows.append(case())
        except ImportError as error:
            rows.append(Row(name, error.name or "", note=f"not installed: {error}"))
        except Exception as error:  # what one library cannot do is no reason to leave the others out
            rows.append(Row(name, "", note=f"failed: {type(error).__name__}: {str(error)[:80]}"))
        print(rows[-1], file=sys.stderr)
    shown = [["", "against", "ratio", "aim", "off", "note"]]
    for row in rows:
        numbers = ["" if value is None else f"{value:.2g}" for value in (row.ratio, row.aim, row.off)]
        shown.append([row.what, row.against, *numbers, row.note])
    print(table(shown))
    if args.out:
        content = {"machine": describe(torch.device("cpu")), "rows": [asdict(row) for row in rows]}
        args.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
