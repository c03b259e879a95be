"""The steps of torch's optimizers as pure functions of parameters, gradients and state, differentiable in all three.

    update, state = updates.of(optimizer, params)
    params, state = update(params, grads, state)

is `optimizer.step()` with these gradients: the same numbers to rounding, nothing written in place, nothing detached. So
the loop of a training, a part of it or one step is a function that autograd can go through.

A state is a dict: for every parameter, by name, what torch's optimizer remembers of it under torch's names, and its
learning rate `lr`. It is a tree of tensors: it can be saved, compared, and differentiated.

Around an update go `clipped`, which clips the gradient's global norm before it, and `scheduled`, which changes its
learning rates. What has been put around is an update again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcghost.errors import InputError
from funcghost.training.adam_rules import Adam, NAdam
from funcghost.training.by_rules import ByRules
from funcghost.training.muon_rule import Muon
from funcghost.training.update_kinds import (
    Clipped,
    Function,
    Plain,
    Schedule,
    Scheduled,
    ScheduledState,
    Update,
    rates_of,
    with_rates,
)
from funcghost.training.update_rules import SGD, RMSprop, Rule, Slots
from funcghost.trees import Tree, split_params

RULES: Mapping[type[torch.optim.Optimizer], Any] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.NAdam: NAdam,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Muon: Muon,
}


def of(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], params: Tree
) -> tuple[ByRules, dict[str, Slots]]:
    """The step of an optimizer as it stands in a loop, as a pure function; and its state, copied.

    `update(params, grads, state) -> (params, state)`, with trees like `params`. Law: `update` of the parameters, their
    gradients and the state is what `optimizer.step()` makes of them, to rounding; Muon's bfloat16 included. The
    optimizer and the parameters are left as they are.

    `params` are the very tensors that the optimizer steps, under the names that the losses know them by, as
    `dict(model.named_parameters())`. Several optimizers (Muon for matrices, AdamW for the rest) make one update.
    Options of a group (`lr`, `betas`, ...) are those of the time of the call; learning rates go into the state, and
    may be changed there: see `scheduled` and `rated`.

    Known: SGD, Adam, AdamW, NAdam, RMSprop, Muon of `torch.optim`, with all of their options.

    Units: those of the optimizer: a step adds to the parameters. Cost: that of the step, unfused, and a copy of the
    state.

    Raises:
        InputError: the optimizer is another one or a subclass, has hooks around its step, or does not step exactly the
            parameters given.

    Example:
        >>> import torch
        >>> from funcghost.training import updates
        >>> params = {"w": torch.tensor([1.0, 2.0], requires_grad=True)}
        >>> update, state = updates.of(torch.optim.SGD(params.values(), lr=0.1, momentum=0.9), params)
        >>> after, state = update(params, {"w": torch.tensor([1.0, 0.0])}, state)
        >>> after["w"].detach(), state["w"]["momentum_buffer"]
        (tensor([0.9000, 2.0000]), tensor([1., 0.]))
    """
    split = split_params(params)
    names = {id(leaf): name for name, leaf in zip(split.names, split.leaves, strict=True)}
    rules: dict[str, Rule] = {}
    state: dict[str, Slots] = {}
    for one in _several(optimizer):
        kind = _known(one)
        for number, group in enumerate(one.param_groups):
            for param in group["params"]:
                name = names.get(id(param))
                if name is None:
                    raise InputError(
                        f"updates.of: group {number} of {type(one).__name__} steps a parameter {list(param.shape)} "
                        "that is not among params. Pass the tensors that it steps, e.g. dict(model.named_parameters())."
                    )
                if name in rules:
                    raise InputError(f"updates.of: params[{name!r}] is stepped by two optimizers.")
                rules[name] = kind.of(group)
                state[name] = _begun(rules[name], param, one.state.get(param, {}), group["lr"])
    if missing := [name for name in split.names if name not in rules]:
        raise InputError(
            f"updates.of: no optimizer steps {missing[:5]}. Leave parameters that are not trained out of params."
        )
    return ByRules({name: rules[name] for name in split.names}), {name: state[name] for name in split.names}


def _several(optimizer: Any) -> list[torch.optim.Optimizer]:
    found = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for one in found:
        if not isinstance(one, torch.optim.Optimizer):
            raise InputError(f"updates.of: takes optimizers of torch.optim, found {type(one).__name__}.")
    return found


def _known(optimizer: torch.optim.Optimizer) -> Any:
    """The rule's class; what is done besides the rule is refused."""
    kind = RULES.get(type(optimizer))
    if kind is None:
        raise InputError(
            f"updates.of: {type(optimizer).__name__} is none of {', '.join(known.__name__ for known in RULES)}. Write "
            "update(params, grads, state) -> (params, state) yourself: any differentiable function will do."
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise InputError(
            f"updates.of: {type(optimizer).__name__} has hooks around its step, which a pure function cannot run. "
            "Remove them, and do what they do around the update."
        )
    return kind


def _begun(rule: Rule, param: Tensor, found: Mapping[str, Any], lr: float | Tensor) -> Slots:
    """The slots that torch has, copied; those it has not made yet as they begin."""
    slots = rule.begin(param.detach())
    for name, value in slots.items():
        kept = found.get(name)
        if isinstance(kept, Tensor):
            slots[name] = kept.detach().to(value.dtype, copy=True)
    if "started" in slots and isinstance(found.get("momentum_buffer"), Tensor):
        slots["started"] = torch.ones_like(slots["started"])
    return slots | {"lr": torch.tensor(float(lr), dtype=torch.float64)}


def rated(state: Tree, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], params: Tree) -> Tree:
    """The state with the learning rates that the optimizer's groups have now, as one of torch's schedulers set them.

    Raises:
        InputError: the optimizer does not step the parameters of this state.

    Example:
        >>> import torch
        >>> from funcghost.training import updates
        >>> params = {"w": torch.ones(2, requires_grad=True)}
        >>> optimizer = torch.optim.SGD(params.values(), lr=0.1)
        >>> update, state = updates.of(optimizer, params)
        >>> optimizer.param_groups[0]["lr"] = 0.05
        >>> float(updates.rated(state, optimizer, params)["w"]["lr"])
        0.05
    """
    fresh = of(optimizer, params)[1]
    if fresh.keys() != rates_of(state).keys():
        raise InputError("rated: the optimizer steps other parameters than those of this state.")
    return with_rates(state, lambda name, _: fresh[name]["lr"])


def clipped(update: Update, max_norm: float) -> Clipped:
    """The update of a gradient whose global norm is clipped before: `G min(1, max_norm / (|G| + 1e-6))`.

    As `torch.nn.utils.clip_grad_norm_` before the step; the state is that of the update.

    Raises:
        InputError: the norm is not positive, or this is no update of this module.

    Example:
        >>> import torch
        >>> from funcghost.training import updates
        >>> params = {"w": torch.zeros(2, requires_grad=True)}
        >>> update, state = updates.of(torch.optim.SGD(params.values(), lr=1.0), params)
        >>> updates.clipped(update, 1.0)(params, {"w": torch.tensor([3.0, 4.0])}, state)[0]["w"].detach()
        tensor([-0.6000, -0.8000])
    """
    _check_update(update, "clipped")
    if not isinstance(max_norm, int | float) or not max_norm > 0:
        raise InputError(f"clipped: max_norm must be a positive number, found {max_norm!r}.")
    return Clipped(update, float(max_norm))


def scheduled(update: Update, state: Tree, schedule: Schedule, count: int = 0) -> tuple[Scheduled, ScheduledState]:
    """The update with `schedule(count)` times its learning rates, `count` being how many steps were taken before.

    `schedule` takes a tensor and gives a number or a tensor, as the function of `torch.optim.lr_scheduler.LambdaLR`
    does for a number. Where one of torch's schedulers sets the rates, use `rated` in every step instead.

    Raises:
        InputError: this is no update of this module, or no state with learning rates.

    Example:
        >>> import torch
        >>> from funcghost.training import updates
        >>> params = {"w": torch.zeros(1, requires_grad=True)}
        >>> update, state = updates.of(torch.optim.SGD(params.values(), lr=1.0), params)
        >>> update, state = updates.scheduled(update, state, lambda count: 0.5**count)
        >>> for _ in range(2):
        ...     params, state = update(params, {"w": torch.ones(1)}, state)
        >>> params["w"].detach()
        tensor([-1.5000])
    """
    _check_update(update, "scheduled")
    if not callable(schedule):
        raise InputError(f"scheduled: schedule must be a function of the count, found {type(schedule).__name__}.")
    rates_of(state)
    return Scheduled(update, schedule), ScheduledState(torch.tensor(float(count), dtype=torch.float64), state)


def _check_update(update: Any, what: str) -> None:
    if not isinstance(update, ByRules | Clipped | Scheduled | Plain):
        raise InputError(
            f"{what}: takes an update as updates.of or updates.plain gives it, found {type(update).__name__}."
        )


def plain(function: Function) -> "Plain":
    """An update from any differentiable function `update(params, grads, state) -> (params, state)`.

    Raises:
        InputError: this is no function.

    Example:
        >>> import torch
        >>> from funcghost.training import updates
        >>> signs = updates.plain(lambda params, grads, state: ({"w": params["w"] - 0.1 * grads["w"].tanh()}, state))
        >>> signs({"w": torch.zeros(1)}, {"w": torch.ones(1)}, {})[0]["w"]
        tensor([-0.0762])
    """
    if not callable(function):
        raise InputError(f"plain: takes a function update(params, grads, state), found {type(function).__name__}.")
    return Plain(function)
