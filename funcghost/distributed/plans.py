"""A plan that one rank makes for all of them."""

from collections.abc import Callable

from torch import distributed

from funcghost.distributed.collectives import Group, several
from funcghost.distributed.faults import named
from funcghost.engine.plans import Plan
from funcghost.errors import InputError, PlanError


def shared_plan(make: Callable[[], Plan], group: Group = None) -> Plan:
    """The plan that `make()` gives on rank 0 of a group, on all of its ranks, of which no other one calls it.

    Every rank must call this. Pass what it gives as `plan=` to a step of `data_parallel`; or to one of `sharded`, where
    `make` plans the whole model before `fully_shard`. Of a model that is sharded already, every rank has to gather the
    parameters for one rank to plan: there, steps plan on all ranks at once, which takes no longer, and each has a plan
    for the ops of its own batch. A rank whose losses run other ops than the plan says plans anew, as ever.

    Cost: a plan on rank 0, for which the others wait, within the process group's timeout; its text is sent to each.

    Raises:
        PlanError: rank 0 could not make it; there, the error itself.
        InputError: `make` gives something else.
        RankError: another rank ended or hangs.

    Example:
        >>> import funcghost as fg, torch
        >>> from funcghost.distributed import data_parallel
        >>> from funcghost.distributed.plans import shared_plan
        >>> losses, params = lambda params, x: x @ params["w"], {"w": torch.zeros(2)}
        >>> plan = shared_plan(lambda: fg.plan(losses, params, torch.eye(2)))
        >>> step = data_parallel.grad_and_reduce(losses, plan=plan)
    """
    if not several(group):
        return _made(make)
    with named("shared_plan", group):
        return _sent(make, group)


def _made(make: Callable[[], Plan]) -> Plan:
    found = make()
    if not isinstance(found, Plan):
        raise InputError(f"shared_plan: make() must give a plan from fg.plan, found {type(found).__name__}.")
    return found


def _sent(make: Callable[[], Plan], group: Group) -> Plan:
    """The plan, of which the others get the text, or the text of what went wrong."""
    own, failed, told = None, None, [("", "")]
    if distributed.get_rank(group) == 0:
        try:
            own = _made(make)
            told = [(own.to_json(), "")]
        except Exception as error:
            failed, told = error, [("", f"{type(error).__name__}: {error}")]
    distributed.broadcast_object_list(told, group=group, group_src=0)
    if failed is not None:
        raise failed
    text, reason = told[0]
    if reason:
        raise PlanError(f"rank 0 could not make the plan for all, so that no rank has one: {reason}")
    return Plan.from_json(text) if own is None else own
