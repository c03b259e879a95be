"""Exact per-sample gradient inner products from one backward pass, as pure functions."""

from funcghost import functional
from funcghost._version import __version__
from funcghost.capture import checkpoint_context
from funcghost.check import check
from funcghost.directions import stack
from funcghost.errors import CheckError, ConservationError, GhostError, InputError, PlanError, UnsupportedOpError
from funcghost.losses import module_losses, per_example
from funcghost.planning import Options
from funcghost.plans import Plan
from funcghost.reducers import Reducer, dot
from funcghost.report import Report
from funcghost.rules import register_rule
from funcghost.transforms import Step, grad_and_reduce, plan, reduce

__all__ = [
    "CheckError",
    "ConservationError",
    "GhostError",
    "InputError",
    "Options",
    "Plan",
    "PlanError",
    "Reducer",
    "Report",
    "Step",
    "UnsupportedOpError",
    "__version__",
    "check",
    "checkpoint_context",
    "dot",
    "functional",
    "grad_and_reduce",
    "module_losses",
    "per_example",
    "plan",
    "reduce",
    "register_rule",
    "stack",
]
