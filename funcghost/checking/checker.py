"""`fg.check`: funcghost against a backward per sample, on the caller's own losses, parameter by parameter."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from funcghost.algebra.directions import as_dense
from funcghost.checking.compare import CallersStep, Column, Factored, Named, Truth, by_autograd, by_funcghost, direction
from funcghost.checking.judge import NOT_COMPARED, NOT_FINITE, OUT_OF_RANGE, Judge, blank_rows
from funcghost.checking.mixing import evaluated, mixing, repeats
from funcghost.checking.report import Report, Row
from funcghost.engine.plans import Plan
from funcghost.errors import ConservationError, GhostError, InputError, MemoryBudgetError, UnsupportedOpError
from funcghost.options import Options, check_options
from funcghost.planning.planner import make_plan
from funcghost.problem import Losses, Problem
from funcghost.reducers.bases import Additive, Directional, split_reducers
from funcghost.transforms.compiling import uncompiled
from funcghost.transforms.steps import Transform
from funcghost.trees import Tree, split_params

FEW = 16
"""How many samples are compared by default."""


def check(
    losses: Losses,
    params: Tree,
    batch: Tree,
    reducers: Tree = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    has_aux: bool = False,
    options: Options | None = None,
    plan: Plan | None = None,
) -> Report:
    """Compares funcghost with per-sample gradients taken one by one, on your losses: run it once on a new model.

    Law: for every parameter and a direction `V` that is nonzero in it alone, `fg.dot(V)` is `<grad losses[i], V>`, with
    the gradient by a call of `torch.autograd.grad` for each sample `i`; and the `grads` of
    `grad_and_reduce(losses, reduction="sum")` are those of `losses.sum()`. `V` is random, partly along the gradients,
    so that no score is small by chance. `fg.per_param(fg.squared_norm())` are the squared norms of those gradients, and
    factored gradients have the same products with `V`.

    `report.ok` says that everything was compared and agrees. It is not ok if

    - an error exceeds the tolerance, `eps^(2/3)` of the lowest precision that the ops compute in, relative to the size
      of the terms of each sum, and the change that rounding of the parameters makes;
    - there is no plan, such as when a use of a parameter is not seen: the message is that of the error;
    - the losses differ from call to call with the same random state: then nothing can be compared;
    - losses or gradients are not finite: they agree with nothing. (Autograd often spreads what is not finite to the
      gradients of other samples.)

    What is no error is reported as a fact: parameters that the losses never use or whose gradient is zero; losses
    that mix samples, so that `losses[i]` changes when other samples of the batch do (found by exchanging these); and
    that norms are not to be had, with what to do about it (a failure if a reducer that needs them is passed).

    Random streams, buffers and `.grad` are left as they were. A progress bar appears on a terminal after two seconds.

    Args:
        losses: as in `grad_and_reduce`.
        params: as in `grad_and_reduce`.
        batch: as in `grad_and_reduce`.
        reducers: reducers to be checked, too: in their directions, or, such as `fg.gram()`, over the gradients
            themselves as far as those of the samples compared determine the result.
        samples: how many samples of the batch to compare, drawn at random; by default all, but 16 at most.
        seed: of the direction and of the samples drawn.
        has_aux: as in `grad_and_reduce`.
        options: as in `grad_and_reduce`.
        plan: a plan to check, such as one made with another batch; without one it is made.

    Cost: a plan, two steps, one with squared norms, a backward for each sample compared, and `2 log2(b)` forwards, with
    memory for three trees like params on top. Parameters whose tangents are carried in the plan take a pass for every
    eight. With reducers such as `fg.gram()` the gradients of all samples compared are kept.

    Raises:
        InputError: an argument is not what it must be, or the losses do not depend on params.

    Example:
        >>> import funcghost as fg, torch
        >>> params = {"w": torch.eye(3), "b": torch.ones(3), "old": torch.zeros(2)}
        >>> def losses(params, x):
        ...     return (x @ params["w"] + params["b"]).square().sum(1)
        >>> report = fg.check(losses, params, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        >>> report.ok, report.facts["mixing"], report.facts["unused"]
        (True, 'no', ['old'])
        >>> report.raise_if_failed()
    """
    problem, options = _problem(losses, params, batch, has_aux), check_options(options)
    directional, others, tasks = _reducers(problem, reducers)
    _check_numbers(samples, seed)
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"plan: must come from fg.plan, found {type(plan).__name__}.")
    with uncompiled():
        first = evaluated(problem)
        batch_size = len(first.values)
        if not batch_size:
            raise InputError("check: the batch has no samples. Pass a batch of two or more.")
        # What a caller gets: along the plan passed, or made; or as one op, where losses are many small ones.
        alone = plan is None and Transform(losses, None, has_aux, options, None).needs_no_plan(problem)
        plan, failures, options = (plan, [], options) if plan else _planned(problem, options)
        precision, eps = lowest_precision(plan, first.values.dtype, problem.devices())
        if options.compute_dtype is not None and (own := float(torch.finfo(options.compute_dtype).eps)) > eps:
            precision, eps = str(options.compute_dtype).removeprefix("torch."), own
        tolerance = eps ** (2 / 3)
        deterministic = repeats(problem, first, eps)
        mixes, known_by = mixing(problem, first, eps) if deterministic else ("unknown", "they differ by themselves")
        chosen = _drawn(batch_size, samples, seed)
        named = Named(direction(problem, chosen, seed), others, tasks)
        rows, truth = blank_rows(problem, plan, named), by_autograd(problem, chosen, named)
        norms_note = "there is no plan"
        if plan is not None:
            step = CallersStep(problem, None if alone else plan, options, directional)
            judge = Judge(problem, chosen, named, eps, tolerance)
            try:
                found = by_funcghost(problem, plan, chosen, named, step)
            except GhostError as error:
                failures.append(f"The step raises {type(error).__name__}: {error}")
                norms_note = "the step raises an error"
            else:
                whole, norms_note, said = _factored(step, chosen, named)
                judge.judge(rows, truth, replace(found, factored=whole))
                failures += [*_complaints(rows, judge.same_losses(truth, found)), *(said or _missed(rows))]
    facts = {
        "batch": batch_size,
        "samples": len(chosen),
        "precision": precision,
        "tolerance": tolerance,
        "deterministic": deterministic,
        "mixing": mixes,
        "mixing_note": known_by,
        "norms": "no" if norms_note else "yes",
        "norms_note": norms_note,
        **_idle(problem, truth),
        "not_finite": (~first.values.isfinite()).nonzero().flatten().tolist(),
    }
    return Report(rows, facts, [*failures, *_shortcomings(facts)])


def _problem(losses: Losses, params: Tree, batch: Tree, has_aux: bool) -> Problem:
    if not callable(losses):
        raise InputError(f"losses: must be a function losses(params, batch) -> [b], found {type(losses).__name__}.")
    problem = Problem(losses, split_params(params), batch, has_aux)
    if problem.is_meta():
        raise InputError("check: tensors on the meta device have no values to compare. Check on a real device.")
    return problem


def _check_numbers(samples: Any, seed: Any) -> None:
    if samples is not None and (type(samples) is not int or samples < 1):
        raise InputError(f"check: samples must be None or a number of samples, 1 or more, found {samples!r}.")
    if type(seed) is not int or seed < 0:
        raise InputError(f"check: seed must be an integer, 0 or more, found {seed!r}.")


def _reducers(
    problem: Problem, reducers: Tree
) -> tuple[list[Directional], list[tuple[str, Column]], list[tuple[str, Additive]]]:
    """The caller's reducers with directions, and these with a name each; and the other reducers with theirs.

    Names are the path of the reducer, and the number of the direction.
    """
    found, spec = split_reducers(reducers)
    directional, columns, tasks = list[Directional](), list[tuple[str, Column]](), list[tuple[str, Additive]]()
    for path, reducer in zip(spec.paths(), found, strict=True):
        name = "reducer " + (".".join(map(str, path)) or type(reducer).__name__)
        parts = reducer.parts()
        own = [part for part in parts if isinstance(part, Directional)]
        directional += own
        directions = [direction for part in own for direction in part.directions(problem.params)]
        for k, leaves in enumerate(directions):
            along = [leaf if leaf is None else as_dense(leaf) for leaf in leaves]
            columns.append((f"{name}[:, {k}]" if len(directions) > 1 else name, along))
        whole = [part for part in parts if isinstance(part, Additive)]
        tasks += [(f"{name}, norms" if own else name, part) for part in whole]
    return directional, columns, tasks


def _factored(step: CallersStep, chosen: list[int], named: Named) -> tuple[Factored | None, str, list[str]]:
    """What is made of factored gradients; or why it is not to be had, and whether that is a failure.

    It is one where the caller asks for such reducers, or where the reason is none that is known beforehand.
    """
    try:
        return step.factored(chosen, named), "", []
    except InputError:
        raise
    except GhostError as error:
        note = f"{type(error).__name__}: {error}"
        expected = isinstance(error, UnsupportedOpError | MemoryBudgetError)
        asked = ", ".join(name for name, _ in named.tasks) or "squared norms"
        failure = f"For {asked} the step raises {note}"
        return None, note, [failure] if named.tasks or not expected else []


def _planned(problem: Problem, options: Options) -> tuple[Plan | None, list[str], Options]:
    """A plan, why there is none, and the options to run it with: one that breaks the law is run to see where."""
    try:
        return make_plan(problem, options), [], options
    except InputError:
        raise
    except GhostError as error:
        failure = f"Planning raises {type(error).__name__}: {error}"
        if not isinstance(error, ConservationError):
            return None, [failure], options
    unverified = replace(options, verify="never")
    try:
        return make_plan(problem, unverified), [failure], unverified
    except GhostError:
        return None, [failure], options


def lowest_precision(plan: Plan | None, dtype: torch.dtype, devices: Sequence[torch.device]) -> tuple[str, float]:
    """The lowest precision that the ops compute in, and its eps; that of the losses where there is no plan.

    On CUDA products of float32 numbers may be of TF32 numbers, those of convolutions and recurrent nets by default.
    """
    dtype = plan.precision if plan else dtype
    if plan and dtype is torch.float32 and any(device.type == "cuda" for device in devices):
        backends: Any = torch.backends  # typed in part
        settings = [backends.cuda.matmul.fp32_precision]
        if any(kind in site.op for site in plan.sites for kind in ("conv", "lstm", "gru", "rnn")):
            settings += [backends.cudnn.conv.fp32_precision, backends.cudnn.rnn.fp32_precision]
        if "tf32" in settings:
            return "tf32", 2.0**-10
    return str(dtype).removeprefix("torch."), float(torch.finfo(dtype).eps)


def _drawn(batch: int, samples: int | None, seed: int) -> list[int]:
    """The samples to compare, in order."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn: list[int] = torch.randperm(batch, generator=generator, device="cpu").tolist()
    return sorted(drawn[: FEW if samples is None else samples])


def _idle(problem: Problem, truth: Truth) -> dict[str, list[str]]:
    """The parameters that do nothing."""
    states = list(zip(problem.params.names, truth.used, truth.largest, strict=True))
    return {
        "unused": [name for name, used, _ in states if not used],
        "zero_gradient": [name for name, used, size in states if used and not size],
    }


def _complaints(rows: list[Row], same_losses: bool) -> list[str]:
    """What to do about the rows that are not ok."""
    off = [row for row in rows if not row["ok"] and row["note"] not in (NOT_FINITE, NOT_COMPARED)]
    wrong = [row["name"] for row in off if "dots" in row["note"] or "grads" in row["note"]]
    beyond = [row["name"] for row in off if row["note"] == OUT_OF_RANGE]
    factors = [row["name"] for row in off if row["name"] not in wrong + beyond]
    unknown = [row["name"] for row in rows if NOT_FINITE in row["note"] and row["kind"] == "parameter"]
    said = []
    if wrong:
        said.append(
            f"Autograd and funcghost disagree for {_listed(wrong)}. If a rule was given to fg.register_rule for an op "
            "that uses them, correct it; if they are used inside a custom autograd Function or a compiled submodule, "
            "call ordinary torch ops on them; otherwise please report this with your model."
        )
    if factors:
        said.append(
            f"Scores are right, but what is made of factored gradients is wrong for {_listed(factors)}. If the terms "
            "of several uses of a parameter cancel, Options(inner_products='materialise') or float64 keeps more "
            "digits; otherwise leave these parameters out of params for reducers such as fg.squared_norm, and please "
            "report this with your model."
        )
    if beyond:
        said.append(
            f"Scores are right, but squares of gradients are out of the range of their dtype for {_listed(beyond)}: "
            "they overflow or vanish, with autograd too. Multiply the losses by a constant, so that gradients are near "
            "1 (scores grow with it, squared norms and Gram matrices with its square), or use float64."
        )
    if unknown:
        said.append(f"Gradients are not finite for {_listed(unknown)}. Check with a batch whose are.")
    if not same_losses:
        said.append("The step gives other losses than the function alone. Please report this with your model.")
    return said


def _missed(rows: list[Row]) -> list[str]:
    """What to do about reducers of which nothing could be compared."""
    blank = [row["name"] for row in rows if row["note"] == NOT_COMPARED]
    missed = f"No number of {_listed(blank)} is of samples compared alone. Compare all, with samples=."
    return [missed] if blank else []


def _shortcomings(facts: dict[str, Any]) -> list[str]:
    """What about the losses themselves stands in the way of a comparison."""
    said = []
    if not facts["deterministic"]:
        said.append(
            "The losses differ from call to call with the same random state: nothing can be compared. Draw random "
            "numbers from the default streams of torch, numpy or Python, and let losses keep no count of their calls."
        )
    if facts["not_finite"]:
        said.append(f"The losses of samples {_listed(facts['not_finite'])} are not finite. Check with others.")
    return said


def _listed(names: list[Any]) -> str:
    return ", ".join(map(str, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
