"""Exact per-sample gradient inner products from one backward pass, as pure functions."""

from funcghost import functional
from funcghost._version import __version__
from funcghost.algebra.compression import compress
from funcghost.algebra.directions import LowRank, stack
from funcghost.algebra.metric import Kronecker
from funcghost.algebra.pair_algebra import combine, cosine, cross_dots, materialize
from funcghost.algebra.pairs import Pairs
from funcghost.algebra.tracking import track
from funcghost.checking.checker import check
from funcghost.checking.report import Report
from funcghost.engine.checkpoints import checkpoint_context
from funcghost.engine.plans import Plan
from funcghost.errors import (
    CheckError,
    ConservationError,
    GhostError,
    InputError,
    MemoryBudgetError,
    PlanError,
    ReplayError,
    SampleAxisError,
    StoreError,
    UnsupportedOpError,
)
from funcghost.losses.examples import per_example
from funcghost.losses.modules import module_losses, trainable
from funcghost.ops.rules import register_rule
from funcghost.options import Options
from funcghost.reducers.bases import Additive, Directional, Reducer
from funcghost.reducers.by_parameter import per_param
from funcghost.reducers.dots import dot
from funcghost.reducers.positions import per_segment, per_token
from funcghost.reducers.projections import project
from funcghost.reducers.quadratic import cross, gram, squared_norm
from funcghost.transforms.functions import apply, grad_and_reduce, pairs, plan, reduce
from funcghost.transforms.steps import Step

__all__ = [
    "Additive",
    "CheckError",
    "ConservationError",
    "Directional",
    "GhostError",
    "InputError",
    "Kronecker",
    "LowRank",
    "MemoryBudgetError",
    "Options",
    "Pairs",
    "Plan",
    "PlanError",
    "Reducer",
    "ReplayError",
    "Report",
    "SampleAxisError",
    "Step",
    "StoreError",
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
    "trainable",
]
