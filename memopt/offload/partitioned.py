"""Parameters that DeepSpeed ZeRO-3 partitions: whole only while the modules that own them run.

Hooks on the modules gather parameters before a module's forward and backward and let go of them afterwards, each time
with another storage. Under a plan, therefore, a saved parameter is known by the parameter and not by its storage; what
the hooks do inside a block is not recorded as the block's doing; and a replay runs the block's code without the hooks,
on stand-ins for the parameters, of which each is gathered when an operation needs its data, if it is not whole then.
Every rank runs the same operations, so that all ranks gather the same parameters in the same order.

DeepSpeed is known by the marks that it leaves on parameters and by its hooks' module; it is never imported.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memopt.offload.actions import BlockCall, Saver
from memopt.offload.errors import UnsupportedBlockError
from memopt.offload.template import Kind, Layout

if TYPE_CHECKING:
    from memopt.offload.recording import Recorder

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned a parameter."""
    return hasattr(parameter, "ds_id") and hasattr(parameter, "ds_status")


class Partitioned:
    """One parameter that ZeRO-3 partitions.

    Args:
        parameter: of any status.
        in_flight: DeepSpeed's gathers that have begun and not ended, by parameter.
    """

    def __init__(self, parameter: Any, in_flight: Any) -> None:
        self.parameter, self._in_flight = parameter, in_flight

    @property
    def layout(self) -> Layout:
        """Of the whole parameter."""
        size = torch.Size(self.parameter.ds_shape)
        stride = torch.empty(size, device="meta").stride()
        return Layout(size, stride, 0, self.parameter.dtype, self.parameter.device)

    def is_whole(self) -> bool:
        """Whether it is gathered now."""
        return bool(self.parameter.ds_status.name == "AVAILABLE")

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies over the parameter as it is gathered now."""
        whole = self.parameter
        if not self.is_whole() or whole.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
            return False
        return bool(0 <= tensor.storage_offset() - whole.storage_offset() < max(whole.numel(), 1))

    @torch.no_grad()
    def gathered(self) -> Tensor:
        """The whole parameter at offset 0 of its storage; gathered for this, and let go again, where it is not whole.

        Whoever uses the tensor keeps its bytes, not the parameter.
        """
        parameter = self.parameter
        if parameter.ds_status.name == "INFLIGHT":
            self._in_flight.pop(parameter).wait()
        if self.is_whole():
            whole: Tensor = parameter.detach()
        else:
            parameter.all_gather()
            whole = parameter.detach()
            parameter.partition()
        return whole if whole.storage_offset() == 0 else whole.clone()


def partitioned_parameters(block: nn.Module, path: str, model: nn.Module) -> tuple[Partitioned, ...]:
    """The parameters of a block that are partitioned.

    Raises:
        UnsupportedBlockError: the model is not the one that DeepSpeed runs, which alone knows the gathers in flight.
    """
    found = [parameter for parameter in block.parameters() if is_partitioned(parameter)]
    in_flight = getattr(model, "ds_inflight_param_registry", None)
    if found and in_flight is None:
        raise UnsupportedBlockError(
            f"block {path!r} has parameters that DeepSpeed ZeRO-3 partitions, and the plan was applied to a "
            f"{type(model).__name__} inside the model that DeepSpeed was given; apply it to engine.module"
        )
    return tuple(Partitioned(parameter, in_flight) for parameter in found)


class SavedParameter:
    """A saved tensor over a partitioned parameter: the parameter, which is gathered where it is not whole."""

    __slots__ = ("__weakref__", "_layout", "_owner", "where")

    def __init__(self, tensor: Tensor, owner: Partitioned, where: str) -> None:
        self._owner, self.where = owner, where
        layout = Layout.of(tensor)
        self._layout = layout._replace(offset=layout.offset - owner.parameter.storage_offset())

    def unpack(self) -> Tensor:
        """The tensor, over the parameter as it is gathered now."""
        return self._layout.over(self._owner.gathered())


class ByParameter(Saver):
    """Saves the tensors over one parameter; whatever else is met in their place is kept as ``other`` does."""

    passive = True

    def __init__(self, owner: Partitioned, other: Saver) -> None:
        self._owner, self._other = owner, other

    def save(self, call: BlockCall, number: int, tensor: Tensor) -> Any:
        """The parameter."""
        if self._owner.holds(tensor):
            return SavedParameter(tensor, self._owner, call.where)
        return self._other.save(call, number, tensor)


@contextmanager
def hooks_unrecorded(block: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Runs its body with DeepSpeed's hooks in the block hidden from a recorder, which learns what they gathered."""

    def quiet(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def run(*args: Any, **kwargs: Any) -> Any:
            before, recorder.paused = recorder.paused, True
            try:
                return hook(*args, **kwargs)
            finally:
                recorder.paused = before
                for one in recorder.partitioned:
                    if one.is_whole():
                        recorder.number(one.parameter, Kind.PARAMETER)

        return run

    changed: list[tuple[dict[int, Any], int, Any]] = []
    for module in block.modules() if recorder.partitioned else ():
        for table in (getattr(module, name) for name in _HOOKS):
            changed += [(table, key, hook) for key, hook in table.items() if _of_deepspeed(hook)]
    try:
        for table, key, hook in changed:
            table[key] = quiet(hook)
        yield
    finally:
        for table, key, hook in changed:
            if key in table:
                table[key] = hook


def stand_ins_for_parameters(block: nn.Module, stand_ins: Mapping[int, Tensor]) -> None:
    """Give a block that is about to be replayed stand-ins for its partitioned parameters, and take its hooks away.

    Only attributes of modules are set, so that ``attributes_restored`` puts everything back.

    Args:
        stand_ins: by the parameter's id.
    """
    for module in block.modules():
        parameters = {name: stand_ins.get(id(value), value) for name, value in module._parameters.items()}
        module.__dict__["_parameters"] = parameters
        for name in _HOOKS:
            hooks = module.__dict__[name]
            module.__dict__[name] = OrderedDict((key, hook) for key, hook in hooks.items() if not _of_deepspeed(hook))


def _of_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")
