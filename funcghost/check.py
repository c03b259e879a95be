"""`fg.check`: funcghost against a backward per sample, on the caller's own losses, parameter by parameter."""

from collections.abc import Sequence
from typing import Any

import torch

from funcghost.compare import NOT_FINITE, Column, Judge, Named, Truth, blank_rows, by_autograd, by_funcghost, direction
from funcghost.errors import ConservationError, GhostError, InputError
from funcghost.lowrank import as_dense
from funcghost.mixing import evaluated, mixing, repeats
from funcghost.planning import Options, check_options, make_plan
from funcghost.plans import Plan
from funcghost.reducers import Directional, split_reducers
from funcghost.report import Report, Row
from funcghost.run import Losses, Problem
from funcghost.transforms import uncompiled
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
    so that no score is small by chance.

    `report.ok` says that everything was compared and agrees. It is not ok if

    - an error exceeds the tolerance, `eps^(2/3)` of the lowest precision that the ops compute in, relative to the size
      of the terms of each sum, and the change that rounding of the parameters makes;
    - there is no plan, such as when a use of a parameter is not seen: the message is that of the error;
    - the losses differ from call to call with the same random state: then nothing can be compared;
    - losses or gradients are not finite: they agree with nothing. (Autograd often spreads what is not finite to the
      gradients of other samples.)

    What is no error is reported as a fact: parameters that the losses never use or whose gradient is zero, and losses
    that mix samples, so that `losses[i]` changes when other samples of the batch do (found by exchanging these).

    Random streams, buffers and `.grad` are left as they were. A progress bar appears on a terminal after two seconds.

    Args:
        losses: as in `grad_and_reduce`.
        params: as in `grad_and_reduce`.
        batch: as in `grad_and_reduce`.
        reducers: reducers whose directions are to be checked, too.
        samples: how many samples of the batch to compare, drawn at random; by default all, but 16 at most.
        seed: of the direction and of the samples drawn.
        has_aux: as in `grad_and_reduce`.
        options: as in `grad_and_reduce`.
        plan: a plan to check, such as one made with another batch; without one it is made.

    Cost: a plan, two steps, a backward for each sample compared, and `2 log2(b)` forwards, with memory for three trees
    like params on top. Parameters whose tangents are carried in the plan take a pass for every eight.

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
    others = _reducer_columns(problem, reducers)
    _check_numbers(samples, seed)
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"plan: must come from fg.plan, found {type(plan).__name__}.")
    with uncompiled():
        first = evaluated(problem)
        batch_size = len(first.values)
        if not batch_size:
            raise InputError("check: the batch has no samples. Pass a batch of two or more.")
        plan, failures, options = (plan, [], options) if plan else _planned(problem, options)
        precision, eps = lowest_precision(plan, first.values.dtype, problem.devices())
        tolerance = eps ** (2 / 3)
        deterministic = repeats(problem, first, eps)
        mixes, known_by = mixing(problem, first, eps) if deterministic else ("unknown", "they differ by themselves")
        chosen = _drawn(batch_size, samples, seed)
        named = Named(direction(problem, chosen, seed), others)
        rows, truth = blank_rows(problem, plan, named), by_autograd(problem, chosen, named)
        if plan is not None:
            judge = Judge(problem, chosen, named, eps, tolerance)
            try:
                found = by_funcghost(problem, plan, chosen, named, options, reducers)
            except GhostError as error:
                failures.append(f"The step raises {type(error).__name__}: {error}")
            else:
                judge.judge(rows, truth, found)
                failures += _complaints(rows, judge.same_losses(truth, found))
    facts = {
        "batch": batch_size,
        "samples": len(chosen),
        "precision": precision,
        "tolerance": tolerance,
        "deterministic": deterministic,
        "mixing": mixes,
        "mixing_note": known_by,
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


def _reducer_columns(problem: Problem, reducers: Tree) -> list[tuple[str, Column]]:
    """The directions of the caller's reducers, by the path of the reducer and the number of the direction."""
    found, spec = split_reducers(reducers)
    columns: list[tuple[str, Column]] = []
    for path, reducer in zip(spec.paths(), found, strict=True):
        parts = [part for part in reducer.parts() if isinstance(part, Directional)]
        directions = [direction for part in parts for direction in part.directions(problem.params)]
        name = "reducer " + (".".join(map(str, path)) or type(reducer).__name__)
        for k, leaves in enumerate(directions):
            along = [leaf if leaf is None else as_dense(leaf) for leaf in leaves]
            columns.append((f"{name}[:, {k}]" if len(directions) > 1 else name, along))
    return columns


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
    unverified = Options(verify="never", route=options.route)
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
    wrong = [row["name"] for row in rows if not row["ok"] and row["note"] != NOT_FINITE]
    unknown = [row["name"] for row in rows if NOT_FINITE in row["note"] and row["kind"] == "parameter"]
    said = []
    if wrong:
        said.append(
            f"Autograd and funcghost disagree for {_listed(wrong)}. If a rule was given to fg.register_rule for an op "
            "that uses them, correct it; if they are used inside a custom autograd Function or a compiled submodule, "
            "call ordinary torch ops on them; otherwise please report this with your model."
        )
    if unknown:
        said.append(f"Gradients are not finite for {_listed(unknown)}. Check with a batch whose are.")
    if not same_losses:
        said.append("The step gives other losses than the function alone. Please report this with your model.")
    return said


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
