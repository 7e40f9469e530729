"""Optimizer states and step on the host, overlapped with backward, as ZeRO-Offload (section 4) does.

Each parameter has a copy on the host with its optimizer state beside it. As soon as its gradient is complete, it is
copied there, a worker thread steps that one parameter, and the new value is copied back; ``step()`` waits for the last.
On the device remain parameters and gradients: none of the state's bytes. With parameters on the CPU there is no copy,
and the parameter itself is stepped. The states may lie in memory-mapped files, for models whose states exceed the
host's memory.

Whatever else is asked of the optimizer between backward and ``step()`` waits for the steps that backward has begun:
nothing looks at a gradient, a group or a state while the worker is at it. Those steps are taken, though: what is
changed there counts from the next step on.

A parameter's step must not depend on other parameters: a rule that looks at several of them at once (a norm over all
gradients, say) sees one at a time here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memopt.offload.states.loading import load_all
from memopt.offload.states.mapped import MappedStates, state_bytes


class HostOptimizer:
    """Steps every parameter on the host while backward goes on.

    Args:
        params: the parameters.
        make: builds an optimizer for a list of parameters, such as ``lambda p: AdamW8bit(p, lr=1e-4)``.
        overlap: step inside backward. Then the gradient of a step must come from one backward, and cannot be clipped or
            scaled between backward and step; without it everything happens in ``step()``.
        state: ``"memory"`` or ``"disk"``: where the states lie.
        folder: for the disk; by default the folder for temporary files.

    Raises:
        ValueError: no parameters, another ``state``, or a folder that cannot be used.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        make: Callable[[list[nn.Parameter]], Optimizer],
        *,
        overlap: bool = True,
        state: str = "memory",
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if state not in ("memory", "disk"):
            raise ValueError(f"state is {state!r}; the states can lie in 'memory' or on 'disk'")
        self._mapped = MappedStates(folder) if state == "disk" else None
        self._params = [parameter for parameter in params if parameter.requires_grad]
        if not self._params:
            raise ValueError("params holds no parameter that requires gradients")
        self._hosts = [_on_host(parameter) for parameter in self._params]
        self._optimizers = [make([host]) for host in self._hosts]
        for number, (host, optimizer) in enumerate(zip(self._hosts, self._optimizers, strict=True)):
            if hasattr(optimizer, "numbering"):
                optimizer.numbering = {host: number}  # what it draws must be what it draws for all of them
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="memopt-host-step")
        self._pending: dict[int, Future[Exception | None]] = {}
        self._hooks = []
        if overlap:
            for number, parameter in enumerate(self._params):
                hook = parameter.register_post_accumulate_grad_hook(self._start(number))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parameters' optimizers, for schedulers that set ``lr`` between steps."""
        wait(self._pending.values())
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _start(self, number: int) -> Callable[[Tensor], None]:
        def begin(parameter: Tensor) -> None:
            self._begin(number)

        return begin

    def _begin(self, number: int) -> None:
        if number in self._pending:
            raise RuntimeError(
                "a second backward reached a parameter before step(); HostOptimizer(overlap=True) steps as soon as a "
                "gradient arrives: call step() after every backward (zero_grad() after one that failed), or give "
                "overlap=False to accumulate gradients"
            )
        parameter = self._params[number]
        gradient = parameter.grad
        assert gradient is not None
        # The copy must have the whole gradient: it is complete on the current stream.
        arrived = None
        host_gradient = gradient
        if parameter.device.type != "cpu":
            host_gradient = torch.empty_like(gradient, device="cpu", pin_memory=True)
            host_gradient.copy_(gradient, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending[number] = self._worker.submit(self._step_one, number, host_gradient, arrived)

    def _step_one(self, number: int, gradient: Tensor, arrived: Any) -> Exception | None:
        """Step one parameter. Raises what kept it from that; returns what, after it, kept its states from the disk."""
        if arrived is not None:
            arrived.synchronize()
        host = self._hosts[number]
        host.grad = gradient
        self._optimizers[number].step()
        if host is not self._params[number]:
            host.grad = None
        if self._mapped is not None:
            try:
                self._mapped.take(self._optimizers[number])
            except Exception as error:
                return error
        return None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Wait until every parameter that has a gradient has been stepped and its new value is back.

        After an error, those that were stepped have their new values and no gradient any more: calling ``step`` again
        steps the others only.

        Args:
            closure: runs forward and backward, as for torch's optimizers.

        Returns:
            What the closure returned.

        Raises:
            SwapError: the disk is full or fails; the states stay in memory until the next step.
            Exception: the first error of an optimizer's step.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for number, parameter in enumerate(self._params):
            if parameter.grad is not None and number not in self._pending:
                self._begin(number)
        self._finish()
        return result

    def _finish(self) -> None:
        """Wait for the steps under way, and bring the new values back."""
        stepped: list[nn.Parameter] = []
        errors: list[BaseException] = []
        for number, future in sorted(self._pending.items()):
            error = future.exception()
            if error is None:
                error = future.result()
                stepped.append(self._params[number])
                self._copy_back(number)
            if error is not None:
                errors.append(error)
        self._pending.clear()
        if errors:
            for parameter in stepped:
                parameter.grad = None
            raise errors[0]

    def _copy_back(self, number: int) -> None:
        parameter, host = self._params[number], self._hosts[number]
        if host is not parameter:
            with torch.no_grad():
                parameter.copy_(host, non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients.

        A parameter that backward has begun to step is stepped, as by ``step``: after a backward that failed, this is
        how the next one can begin.

        Raises:
            Exception: as ``step``; the gradients are dropped.
        """
        try:
            self._finish()
        finally:
            for parameter in self._params:
                parameter.grad = None if set_to_none or parameter.grad is None else parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Every parameter's optimizer state, in order."""
        wait(self._pending.values())
        return {"optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave.

        Raises:
            ValueError: it is for other parameters or another kind of optimizer; nothing is loaded.
        """
        wait(self._pending.values())
        load_all(self._optimizers, state, "optimizers", "parameters", lambda own, part: own.load_state_dict(part))

    def state_bytes(self) -> int:
        """Bytes of the optimizers' states, wherever they lie."""
        wait(self._pending.values())
        return sum(state_bytes(optimizer) for optimizer in self._optimizers)

    def close(self) -> None:
        """Take the hooks off and end the worker, after the steps under way. Safe to repeat."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._worker.shutdown()


def _on_host(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.device.type == "cpu":
        return parameter
    return nn.Parameter(parameter.detach().to("cpu").pin_memory())
