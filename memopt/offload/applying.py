"""Applying a plan to a model, and taking it off again."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn

from memopt.offload.calls import Policy
from memopt.offload.checking import check_actions, check_plan, find_block, missing_fields, refuse_replica
from memopt.offload.errors import PlanMismatchError
from memopt.offload.origin import Counts
from memopt.offload.planned import PlannedForward
from memopt.offload.reporting import StepReport, compare
from memopt.offload.tiers import open_tier
from memopt.offload.tiling import Tiled
from memopt.planner.values import BlockPlan

_planned: WeakSet[nn.Module] = WeakSet()


class PlanLike(Protocol):
    """What the runtime reads of a plan: ``memopt.planner.Plan`` has it, and so may anything else."""

    @property
    def blocks(self) -> tuple[BlockPlan, ...]:
        """The actions, block call by block call."""

    @property
    def swap_tier(self) -> Any:
        """``"host"``, ``"disk"`` or ``"none"``."""


class Handle:
    """A ``plan`` applied to a ``model``: a context manager, or ``remove()`` it by hand. :func:`apply` makes it.

    Args:
        model: whose blocks run under the plan.
        plan: what becomes of their saved storages.
        folder: of the swap tier ``disk``; None: a temporary one.
        limit_bytes: most bytes that the swap tier may hold; None: no limit.
    """

    def __init__(self, model: nn.Module, plan: PlanLike, folder: Any, limit_bytes: int | None) -> None:
        check_plan(model, plan)
        self.model, self.plan = model, plan
        by_path: dict[str, dict[int, BlockPlan]] = {}
        for part in plan.blocks:
            check_actions(part)
            calls = by_path.setdefault(part.path, {})
            if part.call in calls:
                raise PlanMismatchError(f"the plan has two entries for block {part.path!r}, call {part.call}")
            calls[part.call] = part
        blocks = {path: find_block(model, path) for path in by_path}
        for path, block in blocks.items():
            if block in _planned:
                raise PlanMismatchError(
                    f"block {path!r} already runs under a plan; take that one off first with handle.remove()"
                )
        tiles = [(find_block(model, part.path), part) for part in getattr(plan, "tiles", ())]
        for module, part in tiles:
            if isinstance(module.__dict__.get("forward"), Tiled):
                raise PlanMismatchError(f"module {part.path!r}, which the plan runs in tiles, does so already")
        tier_name = str(getattr(plan.swap_tier, "value", plan.swap_tier) or "none")
        self.tier = open_tier(tier_name, folder, limit_bytes)
        self.counts = Counts()
        self._tiles = [
            Tiled(module, part.chunks, part.dim, refuse=partial(self._refuse_tiles, part.path))
            for module, part in tiles
        ]
        self.blocks: list[PlannedForward] = []
        for path, calls in by_path.items():
            parts = [calls.get(n) for n in range(max(calls) + 1)]
            policies = [None if part is None else (part, Policy.of(part, self.tier)) for part in parts]
            self.blocks.append(PlannedForward(blocks[path], path, policies, model, self.counts, self.remove))
        for planned in self.blocks:
            planned.block.forward = planned
            _planned.add(planned.block)
        self._step = model.register_forward_pre_hook(self._entered)
        self._removed = False
        self._steps = 0
        self._passes = getattr(plan, "passes", 1)
        self._reported = (0, 0.0)
        self.report: StepReport | None = None

    def _entered(self, model: nn.Module, args: Any) -> None:
        if model is not self.model:
            refuse_replica(model)
            return
        for planned in self.blocks:
            planned.calls = 0
        if torch.is_grad_enabled():
            self.tier.new_step()
            self._steps += 1
            if self._steps == 1:
                self._meter(start=True)
            elif self._steps == 1 + self._passes and self.report is None:
                self.step_report(self._meter(start=False))

    def _refuse_tiles(self, path: str, why: str) -> None:
        self.remove()
        raise PlanMismatchError(
            f"module {path!r} cannot run in tiles: {why}; the plan is taken off. Trace with tiles=1 and plan again"
        )

    def begin(self) -> None:
        """A step begins: every forward of the model says so by itself, but for the one in whose own hook the plan was
        applied; call it there."""
        self._entered(self.model, ())

    @staticmethod
    def _meter(start: bool) -> int | None:
        if not torch.cuda.is_available() or torch.cuda.get_allocator_backend() == "pluggable":  # such as an Arena
            return None
        if start:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    def step_report(self, metered_peak_bytes: int | None = None) -> StepReport:
        """Compare what has happened since the plan was applied, or since the last report, with one step of the plan.

        Called by itself when the second step begins (after all passes of the first where gradients are accumulated);
        what it returned is in ``report``.

        Args:
            metered_peak_bytes: of the step, from ``memopt.meter`` or the device; without it only copies are compared.

        Warns:
            UserWarning: the peak or the swapped bytes are off by more than 5 %.
        """
        moved, stalled = self.tier.moved_bytes - self._reported[0], self.tier.stall_seconds - self._reported[1]
        self._reported = (self.tier.moved_bytes, self.tier.stall_seconds)
        self.report = compare(self.plan, metered_peak_bytes, moved, stalled, self.counts)
        return self.report

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """A copy of the model carries the hook along; the hook still belongs to this model and does nothing there."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{type(self.model).__name__} runs under a memopt plan and cannot be pickled; save model.state_dict(), or "
            "take the plan off first with handle.remove()"
        )

    def remove(self) -> None:
        """Put every block's own forward back. Graphs made under the plan can still run backward. Safe to repeat."""
        if self._removed:
            return
        self._removed = True
        self._step.remove()
        for planned in self.blocks:
            planned.restore()
            _planned.discard(planned.block)
        for tiled in self._tiles:
            tiled.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def apply(
    model: nn.Module,
    plan: PlanLike,
    *,
    swap_folder: str | os.PathLike[str] | None = None,
    swap_limit_bytes: int | None = None,
) -> Handle:
    """Carry a plan out on a model, from the next forward on, until it is removed.

    Losses, gradients, buffers and random states stay bitwise those of the plain run where the plan keeps, swaps and
    recomputes; compressed storages come back within the error of their format. The model is not edited: only the
    ``forward`` attribute of the planned blocks is covered while the plan is applied.

    Args:
        model: the module that the loop calls; the plan's block paths are relative to it.
        plan: what ``memopt.plan`` made, or anything with ``blocks`` and ``swap_tier``.
        swap_folder: for the disk tier: a folder with room for the swapped bytes.
        swap_limit_bytes: the most that the swap tier may hold at once.

    Returns:
        A handle: ``with memopt.apply(model, plan): ...``, or ``handle.remove()``.

    Raises:
        TypeError: not a plan.
        PlanMismatchError: (a ValueError) the model lacks a block of the plan or is planned already, or the plan is
            infeasible; nothing is applied. The first call of a block raises it too when operations or sizes differ; the
            plan is then taken off.
        UnsupportedBlockError: (a ValueError) a block is compiled or scripted, or the model is a ``DataParallel``;
            nothing is applied.

    Warns:
        UserWarning: beside planned blocks there are others of their class that the plan does not know.
    """
    if missing := missing_fields(plan):
        lacking = " and ".join(missing)
        raise TypeError(f"plan is a {type(plan).__name__} without {lacking}; give what memopt.plan returned")
    return Handle(model, plan, swap_folder, swap_limit_bytes)
