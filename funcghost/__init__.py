"""Exact per-sample gradient inner products from one backward pass, as pure functions."""

from funcghost import functional
from funcghost._version import __version__
from funcghost.algebra import apply, combine, cosine, cross_dots, materialize
from funcghost.capture import checkpoint_context
from funcghost.check import check
from funcghost.directions import stack
from funcghost.errors import (
    CheckError,
    ConservationError,
    GhostError,
    InputError,
    MemoryBudgetError,
    PlanError,
    SampleAxisError,
    UnsupportedOpError,
)
from funcghost.losses import module_losses, per_example
from funcghost.lowrank import LowRank, compress
from funcghost.pairs import Pairs
from funcghost.planning import Options
from funcghost.plans import Plan
from funcghost.positions import per_segment, per_token
from funcghost.projections import project
from funcghost.quadratic import cross, gram, squared_norm
from funcghost.reducers import Reducer, dot, per_param
from funcghost.report import Report
from funcghost.rules import register_rule
from funcghost.steps import Step
from funcghost.tracking import track
from funcghost.transforms import grad_and_reduce, pairs, plan, reduce

__all__ = [
    "CheckError",
    "ConservationError",
    "GhostError",
    "InputError",
    "LowRank",
    "MemoryBudgetError",
    "Options",
    "Pairs",
    "Plan",
    "PlanError",
    "Reducer",
    "Report",
    "SampleAxisError",
    "Step",
    "UnsupportedOpError",
    "__version__",
    "apply",
    "check",
    "checkpoint_context",
    "combine",
    "compress",
    "cosine",
    "cross",
    "cross_dots",
    "dot",
    "functional",
    "grad_and_reduce",
    "gram",
    "materialize",
    "module_losses",
    "pairs",
    "per_example",
    "per_param",
    "per_segment",
    "per_token",
    "plan",
    "project",
    "reduce",
    "register_rule",
    "squared_norm",
    "stack",
    "track",
]
