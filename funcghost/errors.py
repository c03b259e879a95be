"""The exceptions of funcghost.

Every message says where it happened, which rule was broken, what was found, and what to do about it.
"""


class GhostError(Exception):
    """Base class of every error that funcghost raises on purpose."""


class InputError(GhostError, ValueError):
    """An argument is not what the function takes: losses, parameters, a direction, a reducer, an option."""


class UnsupportedOpError(GhostError, RuntimeError):
    """A parameter reaches an operation in a way that funcghost cannot follow."""


class ConservationError(GhostError, RuntimeError):
    """The scores of a batch do not add up to what autograd says: some use of a parameter was missed or wrong."""


class PlanError(GhostError, RuntimeError):
    """A plan does not describe the call it was given for."""


class MismatchError(PlanError):
    """A call's sites are not those of the plan: it is planned anew where that can be done."""


class CheckError(GhostError, RuntimeError):
    """What `fg.check` compared does not agree, or could not be compared."""


class MemoryBudgetError(GhostError, RuntimeError):
    """No way to a result fits `Options.memory_budget`."""


class SampleAxisError(GhostError, RuntimeError):
    """An axis of samples, positions or segments is not where a reducer needs it."""


class VersionError(GhostError, RuntimeError):
    """The installed version of a library lacks what is asked for."""


class StoreError(GhostError, RuntimeError):
    """What is on the disk is damaged, belongs to something else, or cannot be written."""


class ReplayError(GhostError, RuntimeError):
    """A training that was run again did not do what it did the first time."""


class RankError(GhostError, RuntimeError):
    """Another process did not take its part in a step that all take together."""
