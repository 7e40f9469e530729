"""The storage tracker: what is allocated when, by which operation, and for what. Meter and trace both rest on it.

Every tensor that an operation returns is looked up by its storage; a new storage is born with that operation and dies
when the last tensor, view or autograd node over it is gone (a weak reference tells). Nothing is sampled and nothing is
held alive. Below the dispatcher nothing is seen: scratch that a kernel allocates for itself counts only for operations
with a scratch rule (``register_scratch``) or, on real tensors, for memopt's own operations, which are followed inside.

Time is the number of the operation; a storage is live after operation t when ``birth <= t < death``.
"""

from __future__ import annotations

import functools
import gc
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.planner.tracking.losses import LossFinder, is_own_loss
from memopt.planner.tracking.phases import PhaseWatcher
from memopt.planner.tracking.records import History, Record, claim, rounded_bytes, scratch_bytes, tensors_in
from memopt.planner.tracking.restoring import is_restoring
from memopt.planner.values import Category, Phase

_NO_STORAGE = (NotImplementedError, RuntimeError, ValueError)  # sparse, functional and uninitialised tensors
_DEVICE = torch.ops.prim.device.default
_OWN = "memopt"
_UNNAMED = "input"


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that operations touch, while the mode is active.

    Args:
        fake: follow fake tensors (a trace) instead of real ones.
        device: count every storage as lying on this device type, or None for where it is.
    """

    def __init__(self, fake: bool = False, device: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clock = 0
        self.history = History()
        self._fake = fake
        self.device = device
        self._live: dict[int, Record] = {}
        self._known: set[int] = set()
        self._inside: list[str] = []
        self._started = 0.0
        self._phases = self._watch_phases()
        self._grad_hooks: dict[int, Any] = {}
        self._losses = LossFinder(self)
        self._resize: Any = None

    def _watch_phases(self) -> PhaseWatcher:
        return PhaseWatcher(
            self,
            root_entered=self._root_entered,
            root_left=self._root_left,
            stepped=self.adopt_optimizer,
            backward_started=self._backward_started,
        )

    # -- life of the mode ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to watch; storages that exist already are counted from the start once something touches them."""
        if not self._fake:
            self._known = {storage._cdata for storage in _existing_storages()}
            self._watch_resizes()
        self._started = time.perf_counter()
        self._phases.install()
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Ends the watch and removes every hook; storages still alive get no death."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._phases.remove()
        if self._resize is not None:
            torch.UntypedStorage.resize_, self._resize = self._resize, None  # type: ignore[method-assign]
        self._losses.remove()
        for handle in self._grad_hooks.values():
            handle.remove()
        self._grad_hooks = {}
        for record in self.history.records:
            record.watch = None
        self._live = {}

    # -- what exists already ------------------------------------------------------------------------------------------

    def adopt_module(self, module: nn.Module) -> None:
        """Counts a module's parameters and buffers as weights and follows its parameters' gradients."""
        for name, parameter in module.named_parameters():
            self.adopt_parameter(parameter)
            self._name(parameter, f"parameter {name}")
        for name, buffer in module.named_buffers():
            self.adopt(buffer, Category.WEIGHTS)
            self._name(buffer, f"buffer {name}")

    def _name(self, value: Tensor, name: str) -> None:
        for tensor in tensors_in(value):
            record = self.observe(tensor)
            if record is not None and record.name == _UNNAMED:
                record.name = name

    def adopt_parameter(self, parameter: Tensor) -> None:
        """Counts one parameter as a weight, and what becomes its gradient as a gradient."""
        self.adopt(parameter, Category.WEIGHTS)
        if parameter.grad is not None:
            self.adopt(parameter.grad, Category.GRADIENTS)
        if parameter.requires_grad and parameter.is_leaf and id(parameter) not in self._grad_hooks:
            self._grad_hooks[id(parameter)] = parameter.register_hook(self._gradient_arrived)  # type: ignore[no-untyped-call]

    def adopt_optimizer(self, optimizer: Optimizer) -> None:
        """Counts what an optimizer keeps for its parameters as optimizer state."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.adopt_parameter(parameter)
        for value in (*optimizer.state.values(), vars(optimizer).get("state_buffers")):
            self.adopt(value, Category.OPTIMIZER)

    def adopt(self, value: Any, category: Category | None = None) -> None:
        """Counts every tensor in ``value``, from the start if it existed then, and claims it for a category."""
        for tensor in tensors_in(value):
            record = self.observe(tensor)
            if record is not None and category is not None:
                claim(record, category)

    # -- events -------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _touches_memory(func):
            fake = args[0] if func is _DEVICE and args else None  # asked three times for each operation of a trace
            return fake.fake_device if isinstance(fake, FakeTensor) else func(*args, **kwargs)
        if not self._fake and func.namespace == _OWN:
            return self._follow(func, args, kwargs)
        for tensor in tensors_in((args, kwargs), 4):
            self.observe(tensor)
        output = self._run(func, args, kwargs)
        index = self.clock
        name = str(func)
        phase = self._phases.phase()
        self.history.names.append(name)
        self.history.phases.append(phase)
        self.history.seconds.append(time.perf_counter() - self._started)
        category = self._category_inside(name) or (Category.ACTIVATIONS if is_restoring() else None)
        for tensor in tensors_in(output, 4):
            record = self.observe(tensor, index, name)
            if record is not None and category is not None and record.birth == index:
                claim(record, category)
        self._add_scratch(name, scratch_bytes(func._schema.name, args, kwargs), category)
        self._recorded(index, func, args, kwargs, output, phase)
        self._losses.operation_ran(func, args, output)
        self.clock = index + 1
        return output

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs the operation below this mode."""
        return func(*args, **kwargs)

    def _recorded(self, index: int, func: Any, args: Any, kwargs: Any, output: Any, phase: Phase) -> None:
        """Called after each operation; the trace keeps more here."""

    def observe(self, tensor: Tensor, birth: int | None = None, name: str = "") -> Record | None:
        """The record of a tensor's storage, made now if the storage is new; None for what is not followed."""
        if not self._fake and (isinstance(tensor, FakeTensor) or tensor.is_meta):
            return None
        try:
            storage = tensor.untyped_storage()
        except _NO_STORAGE:
            return None
        key = storage._cdata
        record = self._live.get(key)
        device = self.device or tensor.device.type
        size = rounded_bytes(storage.nbytes(), device)
        if record is not None:
            if record.bytes == size:
                return record
            record.death, record.watch = self.clock, None  # resized in place
        elif size == 0:
            return None
        if birth is None:
            birth = 0 if self._fake or key in self._known else self.clock
        new = Record(
            id=len(self.history.records),
            bytes=size,
            birth=birth,
            death=None,
            producer=birth if name else None,
            name=name or (record.name if record else _UNNAMED),
            device=device,
            category=record.category if record else None,
        )
        new.watch = weakref.ref(storage, functools.partial(self._died, key))
        self.history.records.append(new)
        self._live[key] = new
        return new

    def _died(self, key: int, _: Any) -> None:
        record = self._live.pop(key, None)
        self._known.discard(key)
        if record is not None:
            self._ended(record)

    def _ended(self, record: Record) -> None:
        record.death, record.watch = max(self.clock, record.birth + 1), None

    def _watch_resizes(self) -> None:
        """FSDP frees and takes back the memory of gathered parameters by resizing storages that live on."""
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self._died(storage._cdata, None)  # what touches it next finds a new one
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs one of memopt's own operations with this mode active inside its kernel."""
        device = next((t.device.type for t in tensors_in((args, kwargs), 4)), "cpu")
        key = torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
        self._inside.append(func._schema.name)
        try:
            with self:
                output = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
            self._losses.operation_ran(func, args, output)
            return output
        finally:
            self._inside.pop()

    def _category_inside(self, name: str) -> Category | None:
        outer = self._inside[0] if self._inside else name
        return Category.LOGITS if is_own_loss(outer) else None

    def _add_scratch(self, name: str, size: int, category: Category | None) -> None:
        index = self.clock
        if size > 0:
            self.history.records.append(
                Record(
                    len(self.history.records), size, index, index + 1, index, f"{name} scratch", self.device or "cpu",
                    category,
                )
            )  # fmt: skip

    def _gradient_arrived(self, gradient: Tensor) -> None:
        self.adopt(gradient, Category.GRADIENTS)

    def _root_entered(self, module: nn.Module) -> None:
        self._losses.model_entered()
        self.adopt_module(module)

    def _root_left(self, module: nn.Module, output: Any) -> None:
        self._losses.model_left(output)

    def _backward_started(self) -> None:
        self._losses.backward_started()


@functools.cache
def _touches_memory(func: Any) -> bool:
    """Whether an operation returns or writes tensors; questions about sizes and values leave no trace."""
    schema = func._schema
    tensors = any("Tensor" in str(result.type) for result in schema.returns)
    return tensors or any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def _existing_storages() -> Iterator[Any]:
    """Storages of every tensor that Python knows of: one walk over the garbage collector's objects."""
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not issubclass(type(thing), FakeTensor):
            try:
                yield thing.untyped_storage()
            except _NO_STORAGE:
                continue
