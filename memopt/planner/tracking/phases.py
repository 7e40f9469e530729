"""Which part of a training step runs now, found without touching the loop.

Global module hooks show when a model (a module that nobody else called) starts and ends, the autograd engine tells by
itself that backward runs, and global optimizer hooks enclose every optimizer's step. Between them: after the model's
forward comes the loss, after backward what surrounds the optimizer (clipping, unscaling), after the step the next
batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from memopt.planner.values import Phase

Listener = Callable[..., None]


def _ignore(*_: Any) -> None:
    """Listens to nothing."""


class PhaseWatcher:
    """Follows the phases of one thread's training steps through global hooks, from ``install`` to ``remove``.

    ``mode`` tells which threads belong to it: the one that installed it, and those of the autograd engine that run its
    backward under the same mode. What other threads train or trace is theirs.

    Listeners (all optional): ``root_entered(module)``, ``root_left(module, output)`` for outermost modules with
    parameters, ``module_entered(module, args)`` and ``module_left(module, args, kwargs, output, failed)`` for every
    module, ``stepped(optimizer)`` before and after an optimizer's step, ``backward_started()``.
    """

    def __init__(
        self,
        mode: TorchDispatchMode,
        root_entered: Listener = _ignore,
        root_left: Listener = _ignore,
        module_entered: Listener = _ignore,
        module_left: Listener = _ignore,
        stepped: Listener = _ignore,
        backward_started: Listener = _ignore,
    ) -> None:
        self._mode = mode
        self._thread = threading.get_ident()
        self._root_entered = root_entered
        self._root_left = root_left
        self._module_entered = module_entered
        self._module_left = module_left
        self._stepped = stepped
        self._backward_started = backward_started
        self._stack: list[tuple[nn.Module, bool]] = []
        self._steps = 0
        self._in_backward = False
        self._outside = Phase.FORWARD
        self._handles: list[Any] = []

    def install(self) -> None:
        """Starts watching the thread that calls it."""
        self._thread = threading.get_ident()
        self._handles = [
            register_module_forward_pre_hook(self._before_module),
            register_module_forward_hook(self._after_module, with_kwargs=True, always_call=True),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Stops watching and takes every hook away."""
        for handle in self._handles:
            handle.remove()
            # torch 2.13 leaves the mark of a hook that takes keywords behind, and warns of it in torch.compile.
            getattr(nn.modules.module, "_global_forward_hooks_with_kwargs", {}).pop(handle.id, None)
        self._handles = []

    def _elsewhere(self) -> bool:
        return threading.get_ident() != self._thread and self._mode not in _get_current_dispatch_mode_stack()

    def phase(self) -> Phase:
        """The phase of an operation that runs now."""
        if self._steps:
            return Phase.OPTIMIZER
        if torch._C._current_graph_task_id() != -1:
            if not self._in_backward:
                self._in_backward = True
                self._backward_started()
            return Phase.BACKWARD
        if self._in_backward:
            self._in_backward = False
            self._outside = Phase.OPTIMIZER
        if self._stack and self._outside is not Phase.LOSS:
            return Phase.FORWARD
        return self._outside

    def _before_module(self, module: nn.Module, args: Any) -> None:
        if self._elsewhere():
            return
        outermost = not self._stack and torch._C._current_graph_task_id() == -1
        if outermost:
            outermost = next(module.parameters(), None) is not None
            if outermost:
                self.phase()  # notices a backward that has ended since the last operation
                self._outside = Phase.FORWARD
                self._root_entered(module)
        self._stack.append((module, outermost))
        self._module_entered(module, args)

    def _after_module(self, module: nn.Module, args: Any, *rest: Any) -> None:
        if self._elsewhere():
            return
        failed = len(rest) < 2  # torch passes no kwargs to an always-called hook when the module raised
        kwargs, output = ({}, None) if failed else rest
        while self._stack:  # a module that raised before its own hooks were reached leaves its entry behind
            entered, outermost = self._stack.pop()
            if entered is module:
                break
        else:
            return
        self._module_left(module, args, kwargs, output, failed)
        if outermost:
            self._outside = Phase.LOSS
            self._root_left(module, output)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._elsewhere():
            return
        self._steps += 1
        self._stepped(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._elsewhere():
            return
        self._stepped(optimizer)
        self._steps -= 1
        if not self._steps and torch._C._current_graph_task_id() == -1:
            self._in_backward = False
            self._outside = Phase.FORWARD
