"""A model under `fully_shard` (FSDP2) as it is used here: its groups of parameters, and what they are unsharded to.

What a layer reads is, in every forward, the same tensor, a leaf of autograd's graph: the whole parameter, whose memory
is there only while its group is unsharded. The engine is given these leaves as parameters.

FSDP2 has no interface for any of this: the names of `torch.distributed.fsdp._fully_shard` stand in
this file and in `fsdp_groups.py` alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, _common_utils
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, TrainingState
from torch.distributed.tensor import DTensor

from funcghost.distributed.fsdp_groups import Companion, Group, Part, last, sharded_as, standing, unseen
from funcghost.engine.checkpoints import active
from funcghost.errors import InputError, UnsupportedOpError
from funcghost.trees import Params
from funcghost.versions import SHARDED_MODELS, need

NONE = -1
"""The number of no backward."""


class Sharded:
    """The parameters of a step on a model under `fully_shard`.

    Raises:
        InputError: the model is not the root of what is sharded, or params are not its own parameters.
        VersionError: this torch's FSDP2 cannot be used so.
    """

    def __init__(self, model: nn.Module, params: Params) -> None:
        """Finds the groups of the params."""
        if not isinstance(model, FSDPModule):
            raise InputError(
                f"sharded: the model must be one that fully_shard was applied to, found {type(model).__name__}. Apply "
                "it to the root as well; for models that every rank has as a whole use "
                "funcghost.distributed.data_parallel."
            )
        need(SHARDED_MODELS, "a step on a model under fully_shard", "use data_parallel with whole models on each rank.")
        self.root: Any = model._get_fsdp_state()
        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        self.states: list[Any] = list(dict.fromkeys(part._get_fsdp_state() for part in parts))
        self.every = [group for state in self.states for group in state._fsdp_param_groups]
        every = [(group, own) for group in self.every for own in group.fsdp_params]
        places = {id(leaf): (group, own) for group, own in every for leaf in sharded_as(own)}
        found: dict[int, Group] = {}
        for number, (name, leaf) in enumerate(zip(params.names, params.leaves, strict=True)):
            place = places.get(id(leaf))
            if place is None:
                raise InputError(f"params[{name!r}] {_not_own(leaf)}")
            group, own = place
            found.setdefault(id(group), Group(group)).parts.append(Part(number, own))
        self.params, self.groups, self.backward = params, list(found.values()), NONE
        self.visited: list[int] = []
        self.reached: Sequence[bool] = ()
        self.root._lazy_init()
        if not self.root._is_root:
            raise InputError("sharded: the model is a part of another one that is sharded. Pass the root.")
        self._check()

    def _check(self) -> None:
        names = self.params.names
        for group in self.groups:
            name = names[group.parts[0].number]
            if not isinstance(group.own.mesh_info, FSDPMeshInfo):
                raise InputError(
                    f"params[{name!r}] is replicated by its mesh, and not sharded. Use fully_shard with a mesh of one "
                    "axis, or of two (replicate, shard), or funcghost.distributed.data_parallel for whole models."
                )
            for part in group.parts:
                if hasattr(part.own._sharded_local_tensor, "fsdp_pre_all_gather"):
                    raise InputError(
                        f"params[{names[part.number]!r}] is gathered by an extension of its own "
                        "(fsdp_pre_all_gather): what layers read is not the parameter itself, and its scores are not "
                        "supported. Pass ordinary parameters, e.g. without float8 all-gather."
                    )
        if len({group.ranks for group in self.groups}) > 1:
            raise InputError(
                "params are sharded over meshes of different sizes, so that their gradients are of different samples. "
                "Use one mesh for all of them."
            )

    @property
    def ranks(self) -> int:
        """How many ranks have samples of their own: all, but for those that compute the same together."""
        return self.groups[0].ranks

    @property
    def in_parts(self) -> bool:
        """Whether some parameters are shared by tensor parallel ranks, too."""
        return any(part.own.is_dtensor for group in self.groups for part in group.parts)

    @property
    def ready(self) -> bool:
        """Whether there are leaves: FSDP2 makes them when it gathers for the first time."""
        return all(hasattr(part.own, "_unsharded_param") for group in self.groups for part in group.parts)

    @property
    def way(self) -> int:
        """A checksum of the groups that a forward went through, in their order: in it ranks gather parameters."""
        return int.from_bytes(sha256(repr(self.visited).encode()).digest()[:7])

    def leaves(self) -> list[Tensor]:
        """What layers read, in the order of the params."""
        found: dict[int, Tensor] = {part.number: part.leaf for group in self.groups for part in group.parts}
        return [found[number] for number in range(len(found))]

    def check_idle(self) -> None:
        """No gradient may be on its way: of a step that is accumulated without its average.

        Raises:
            InputError: gradients are being accumulated, or would not be there when a backward ends.
        """
        context = self.root._state_ctx
        if not context.is_last_backward or getattr(context, "manual_backward_finalization", False):  # new in 2.15
            raise InputError(
                "sharded: a backward is told not to wait for its gradients (set_is_last_backward(False), "
                "set_manual_backward_finalization(True)), and a step gives them. Switch both back before the step."
            )
        for group in self.every:
            waiting = group._partial_reduce_output is not None or any(
                own.unsharded_accumulated_grad is not None for own in group.fsdp_params
            )
            if waiting or not (group.reduce_grads and group.all_reduce_grads):
                raise InputError(
                    "sharded: gradients are being accumulated without their average over ranks "
                    "(set_requires_gradient_sync(False), set_requires_all_reduce(False)), and a step gives the average."
                    " Accumulate the gradients that steps return, and switch the synchronization on."
                )
            if group._all_reduce_hook is not None:
                raise InputError(
                    "sharded: set_all_reduce_hook changes gradients in a way that is not known here. Take the hook off."
                )

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Gradients are averaged over ranks, also where a loop is to accumulate them without (`no_sync`)."""
        kept = [(own, own.reduce_grads, own.all_reduce_grads) for own in self.every]
        try:
            for own in self.every:
                own.reduce_grads = own.all_reduce_grads = True
            yield
        finally:
            for own, reduces, all_reduces in kept:
                own.reduce_grads, own.all_reduce_grads = reduces, all_reduces

    @contextmanager
    def at(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The parameters have other values for a while, of which each rank gives its share; then their own again."""
        own = [leaf.to_local().detach() for leaf in self.params.leaves if isinstance(leaf, DTensor)]
        kept = [local.clone() for local in own]
        try:
            for local, value in zip(own, values, strict=True):
                local.copy_(value)
            yield
        finally:
            for local, value in zip(own, kept, strict=True):
                local.copy_(value)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters are there, on every rank, and FSDP2 does nothing: what is run inside talks to no other rank.

        Every rank must come here. Memory: the whole model, and the gradients of what is differentiated inside.
        """

        def inert(number: int) -> dict[str, Callable[..., Any]]:
            def pre_forward(module: nn.Module, args: Any, kwargs: Any) -> Any:
                self.visited.append(number)
                return args, kwargs

            return {"pre_forward": pre_forward, "post_forward": last}

        self.visited = []
        try:
            for group in self.every:
                group.unshard()
                group.wait_for_unshard()
            with standing(
                [
                    *((group, inert(number)) for number, group in enumerate(self.every)),
                    *((state, {_HOOK: last}) for state in self.states),
                ]
            ):
                yield
        finally:
            self.reset()

    def reset(self) -> None:
        """Leaves FSDP2 as it is between two steps, also where a forward or a backward ended early."""
        rows = [(leaf, leaf.grad) for leaf in (own.sharded_param for group in self.every for own in group.fsdp_params)]
        self.root._reset_iter_state()
        for leaf, gradient in rows:  # from 2.15 on it is taken away, as a part of what ended early
            leaf.grad = gradient

    @contextmanager
    def followed(self, companies: Mapping[Group, Companion]) -> Iterator[None]:
        """A step runs: what goes with the parameters of a group comes and goes with them, from FSDP2's own hooks.

        What FSDP2 runs to gather is not shown to any mode.
        """
        known = {id(group.own): company for group, company in companies.items()}
        groups = [(own, self._methods(number, own, known.get(id(own)))) for number, own in enumerate(self.every)]
        self.visited = []
        try:
            with standing([*groups, *((state, self._hooks(state)) for state in self.states)]):
                yield
        finally:
            self.backward = NONE

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the losses: a backward that ends at what the model gives out, of which FSDP2 is not to hear."""
        with standing([(self.root, {_ASIDE: last})]):
            yield

    def _hooks(self, state: Any) -> dict[str, Callable[..., Any]]:
        """What stands for the methods of a state while a step runs."""
        kept = state._pre_backward

        def pre_backward(grad: Tensor) -> Tensor:
            found: Tensor = grad if _ASIDE in vars(self.root) else kept(grad)
            return found

        return {_HOOK: unseen(getattr(state, _HOOK)), "_pre_backward": pre_backward}

    def _methods(self, number: int, own: Any, company: Companion | None) -> dict[str, Callable[..., Any]]:
        """What stands for the methods of a group while a step runs."""

        def wanted() -> bool:
            return company is not None and (company.early or own._training_state == TrainingState.PRE_BACKWARD)

        def unshard(*args: Any, **kwargs: Any) -> None:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                kept["unshard"](*args, **kwargs)
                if company is not None and wanted():
                    company.start()

        def wait_for_unshard() -> None:
            with torch._C.DisableTorchFunction():
                kept["wait_for_unshard"]()
                if company is not None and wanted():
                    with torch.no_grad():
                        company.finish()

        def pre_forward(*args: Any) -> Any:
            self.visited.append(number)
            return kept["pre_forward"](*args)

        def pre_backward(*args: Any) -> None:
            self._check_going_back()
            kept["pre_backward"](*args)

        def post_backward(*args: Any) -> None:
            self._check_going_back()
            kept["post_backward"](*args)
            if company is not None and not company.early:
                company.free()

        def register(args: Any, kwargs: Any) -> Any:
            # FSDP2 puts an identity behind what goes into a layer, to hear when its gradients have come: it is no op of
            # the losses.
            with torch._C.DisableTorchFunction():
                known = _common_utils.collect_grad_tensors((args, kwargs))
                args, kwargs = kept["_register_post_backward_hook"](args, kwargs)
                behind = _common_utils.collect_grad_tensors((args, kwargs))
            mode = active.get()
            if mode is not None:
                for old, new in zip(known, behind, strict=True):
                    mode.renamed(old, new)
            return args, kwargs

        parts: dict[str, Callable[..., Any]] = {
            "unshard": unshard,
            "wait_for_unshard": wait_for_unshard,
            "reshard": unseen(own.reshard),
            "pre_forward": pre_forward,
            "pre_backward": pre_backward,
            "post_backward": post_backward,
            "_register_post_backward_hook": register,
        }
        kept: dict[str, Callable[..., Any]] = {name: getattr(own, name) for name in parts}
        return parts

    def go_back(self, losses: Tensor) -> None:
        """Says that the next backward of the losses is that of the step."""

        def begin(_: Tensor) -> None:
            self.backward = torch._C._current_graph_task_id()

        losses.register_hook(begin)

    def _check_going_back(self) -> None:
        """Hooks of FSDP2 are for the backward of the step alone: others are had by some rank, and once per sample.

        Raises:
            UnsupportedOpError: another backward has come to one.
        """
        if torch._C._current_graph_task_id() not in (self.backward, NONE) or self.backward == NONE:
            raise UnsupportedOpError(
                "what is computed from a parameter goes on from layer to layer of fully_shard without being scored, "
                "since samples mix or a custom autograd Function is on the way. To follow it takes a backward through "
                "these layers, whose parameters may be freed, or not be there yet. Put these modules into one group, "
                "fully_shard([one, other]); call ordinary torch ops in place of the Function; use fg.dot alone, or "
                "score the model before fully_shard."
            )


def _not_own(leaf: Tensor) -> str:
    if isinstance(leaf, DTensor):
        return (
            "is a DTensor, and not a parameter of the model that fully_shard shards: pass "
            "dict(model.named_parameters()) as it is when the step is called. The losses are those of the model's own "
            "parameters (torch.func.functional_call ignores other values under fully_shard)."
        )
    return (
        "is not sharded by fully_shard (it was ignored, or belongs to another model). Leave it out of params, or shard "
        "it."
    )


_HOOK = "_register_pre_backward_hook"
_ASIDE = "_funcghost_aside"
