"""How Dynamo, which reads Python for `torch.compile` and guards what it has read, is made to read the losses of a step.

This imports Dynamo, which takes as long as the import of torch: `funcghost.transforms.compiling` imports it when
something is compiled.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.comptime import ComptimeContext
from torch._dynamo.exc import TorchRuntimeError, Unsupported
from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting, VariableTracker
from torch._dynamo.variables.higher_order_ops import dynamo_enable_grad
from torch._dynamo.variables.lists import TupleVariable
from torch._dynamo.variables.tensor import SymNodeVariable

from funcghost.errors import PlanError
from funcghost.transforms.compiling import Compilable, Given

BY_ARGUMENT = "Hand it in with the batch, as a tensor or a number, or do without torch.compile here."
ANEW: Any = object()
"""What stands for an argument that comes in anew in every call of a graph."""


def read_losses(ctx: ComptimeContext) -> None:
    """Called by Dynamo while it reads a method with the locals `self`, `losses`, `params`, `batch`, `reducers`.

    `leaves` and `spec` are these arguments as a flat tree. Sets the locals `traced`, `given` and `captured`:
    `traced(given, captured)` is the step along the plan.

    Raises:
        PlanError: what the losses do cannot be told by the compiler, or the graph could not repeat it.
    """
    tx = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    local = tx.symbolic_locals
    step: Compilable | None = _known(tx, local["self"])
    if step is None:
        raise PlanError("a step must be made outside of what is compiled: call fg.grad_and_reduce or fg.reduce there.")
    leaves = [leaf.realize() for leaf in local["leaves"].unpack_var_sequence(tx)]
    spec, constants, places = local["spec"].as_python_constant(), list[Any](), list[int]()
    for place, leaf in enumerate(leaves):
        constants.append(_constant(leaf))
        if constants[-1] is ANEW:
            places.append(place)
    given = [leaves[place] for place in places]
    values = [_value(tx, leaf) for leaf in given]
    if not any(value is None for value in values):
        whole = Given(spec, constants, places, ()).tree(values)
        if not step.prepare(*whole):
            _fix_sizes(given, values)
    own = {leaf.as_proxy().node for leaf in given}
    captured = [variable for variable in _guarded(tx) if variable.as_proxy().node not in own]
    originals = [variable.as_proxy().node.meta["grapharg"].example for variable in captured]
    local["traced"] = VariableTracker.build(tx, _traced(step, Given(spec, constants, places, originals)))
    local["given"], local["captured"] = TupleVariable(given), TupleVariable(captured)


def _constant(leaf: VariableTracker) -> Any:
    """The value of a leaf that is the same in every call of the graph; `ANEW` for one that is not."""
    if leaf.is_python_constant():
        return leaf.as_python_constant()
    if isinstance(leaf, SymNodeVariable) and leaf.python_type() is not float:
        return leaf.evaluate_expr()  # which rows an int names has been measured for that very int
    if leaf.is_tensor() or isinstance(leaf, SymNodeVariable):
        return ANEW
    raise PlanError(
        f"the compiler cannot take apart a {leaf.python_type().__name__} in params, batch or reducers. Pass its "
        "tensors in a dict, list or named tuple, or register it with torch.utils._pytree.register_pytree_node."
    )


def _value(tx: Any, leaf: VariableTracker) -> Any:
    """The value of a leaf in the call that is traced; None where the compiled code itself makes it."""
    if isinstance(leaf, SymNodeVariable):
        return leaf.sym_num.node.hint if leaf.sym_num.node.has_hint() else None
    return _known(tx, leaf)


def _fix_sizes(leaves: Sequence[VariableTracker], values: Sequence[Any]) -> None:
    """Makes a graph for these sizes alone, but for those that the user has marked as dynamic."""
    for leaf, value in zip(leaves, values, strict=True):
        if leaf.is_tensor() and not hasattr(value, "_dynamo_dynamic_indices"):
            for size in leaf.as_proxy().node.meta["example_value"].shape:
                int(size)


def _traced(step: Compilable, given: Given) -> Callable[..., Any]:
    def along_plan(leaves: Sequence[Any], captured: Sequence[Tensor]) -> tuple[Any, ...]:
        return step.along_plan(given, leaves, captured)

    traced: Callable[..., Any] = torch._dynamo.nonstrict_trace(along_plan)
    return traced


def _known(tx: Any, variable: VariableTracker) -> Any:
    """The value that a variable has in this call; None where the compiled code itself makes it."""
    if variable.source is None:
        return None
    try:
        return tx.output.resolve_source_value(variable.source)
    except (AttributeError, KeyError, IndexError, NameError, TypeError):
        return None


def _guarded(tx: Any) -> list[VariableTracker]:
    """Has Dynamo read the losses, and forgets all but its guards; gives the tensors that the graph can take in."""
    output, local = tx.output, tx.symbolic_locals
    graph, random = output.graph, len(output.random_calls)
    before, effects = set(graph.nodes), output.side_effects.clone()
    numbers_are_fixed = torch._dynamo.config.patch(specialize_int=True, specialize_float=True)
    try:
        with warnings.catch_warnings(), numbers_are_fixed, dynamo_enable_grad(tx, True):
            warnings.simplefilter("ignore")  # about the speed of ops that are dropped
            local["losses"].call_function(tx, [local["params"], local["batch"]], {})
    except (Unsupported, TorchRuntimeError) as error:
        raise PlanError(
            "torch.compile cannot read the losses, so it could not tell when to compile them anew: "
            f"{str(error).strip()} Change that, or leave the step uncompiled."
        ) from error
    new = [node for node in graph.nodes if node not in before and node.op != "placeholder"]
    for node in reversed(new):
        graph.erase_node(node)
    if len(output.random_calls) > random:
        raise PlanError(f"the losses draw random numbers that are not torch's, which a graph does not. {BY_ARGUMENT}")
    _refuse_changes(tx, output.side_effects, set(new))
    effects.track_runahead_tensor_and_symvar_side_effects(output.side_effects)
    output.side_effects = effects
    found = list[VariableTracker]()
    for node in graph.nodes:
        argument = node.meta.get("grapharg") if node.op == "placeholder" else None
        if argument is not None and argument.is_tensor and isinstance(argument.example, Tensor):
            if argument.example not in effects:
                raise PlanError(f"the losses read an array, {argument.source.name}, in a graph. {BY_ARGUMENT}")
            found.append(effects[argument.example])
    return found


def _refuse_changes(tx: Any, effects: Any, erased: set[Any]) -> None:
    """Refuses losses that leave Python objects changed which are older than the call: a graph would do so but once."""
    for variable in list(effects.id_to_variable.values()):  # to look is to take in more
        kind = variable.mutation_type
        if not isinstance(kind, AttributeMutationExisting | ValueMutationExisting) or not effects.is_modified(variable):
            continue
        written, value = effects.store_attr_mutations.get(variable, {}), _known(tx, variable)
        names = [name for name, part in written.items() if not _same(tx, erased, part, getattr(value, name, ANEW))]
        if names or (not (written and _items(variable) is None) and _differs(tx, variable, erased)):
            owner = "a global variable" if variable.source is None else variable.source.name
            what = f"{names} of {owner}" if names else owner
            raise PlanError(
                f"the losses change {what}, which a graph cannot do in every call. Return it as aux (has_aux=True), or "
                "leave it out while torch.compiler.is_compiling()."
            )


def _differs(tx: Any, variable: VariableTracker, erased: set[Any]) -> bool:
    """Whether a container has been left with other things in it than were there."""
    value, items = _known(tx, variable), _items(variable)
    if value is None or items is None or len(items) != len(value):
        return True
    if not isinstance(items, dict):
        return not all(map(partial(_same, tx, erased), items, value))
    if not all(key.vt.is_python_constant() for key in items):
        return True
    found = {key.vt.as_python_constant(): part for key, part in items.items()}
    if not isinstance(value, dict):
        return found.keys() != set(value)
    return found.keys() != value.keys() or not all(_same(tx, erased, found[key], value[key]) for key in found)


def _items(variable: VariableTracker) -> Any:
    """What is in a container, or in the list or dict that an object is by descent; None for others."""
    inner = getattr(variable, "_base_vt", None)
    return getattr(variable if inner is None else inner, "items", None)


def _same(tx: Any, erased: set[Any], part: VariableTracker, value: Any) -> bool:
    """Whether what is in a container is what was there."""
    known = _known(tx, part)
    if known is not None:
        made = part.is_proxy() and isinstance(proxy := part.as_proxy(), torch.fx.Proxy) and proxy.node in erased
        return known is value and not made
    if not part.is_python_constant():
        return False
    constant = part.as_python_constant()
    return constant is value or (type(constant) is type(value) and bool(constant == value))
