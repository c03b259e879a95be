"""What is recorded of a trainer's run, and what is told of each of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from funcghost.attribution.path import Rule
from funcghost.integrations.steps import Kind
from funcghost.options import Options
from funcghost.store.manifest import JSON


@dataclass(frozen=True)
class Valuation:
    """What is recorded of a run, and where to.

    Args:
        path: the folder of the record: rows of step, sample and value, see `store.record`. A sample is told by its
            place in `trainer.train_dataset`.
        validation: the data set whose loss the values are about, or the name of one of the trainer's; by default the
            trainer's `eval_dataset`. Its loss is what the trainer would optimise on it, in evaluation mode: the mean
            over all its items where the trainer counts them, otherwise the mean over its samples.
        kind: "path" writes the column `value`, the change of the validation loss by the very step that was made which
            the sample is responsible for (negative: it helped). "score" writes `score`, the inner product of the
            sample's part of the training gradient with the validation gradient (positive: it helps), which needs no
            particular optimizer.
        rule: see `in_run.along_path`.
        renew: with "score", after how many steps the validation gradient is taken anew.
        pairs_memory: bytes of per-sample gradients in factored form that a step may keep; what does not fit is seen
            twice.
        options: as in `fg.grad_and_reduce`.
        origin: what the run follows from, kept in the record.
    """

    path: str | Path
    validation: Any = None
    kind: Kind = "path"
    rule: Rule = "trapezoid"
    renew: int = 1
    pairs_memory: int | None = None
    options: Options | None = None
    origin: Mapping[str, JSON] = field(default_factory=dict)


class StepAccount(NamedTuple):
    """What a step did to the validation loss: `values + rest == change`, up to quadrature."""

    step: int
    values: float
    rest: float
    change: float
