"""For the offload benchmarks: plans by hand, steps, and variants that take turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memopt
from examples.gpt import GPT, GPTConfig
from memopt.offload import apply
from memopt.offload.template import Kind, Template
from memopt.planner.values import Action, BlockPlan, StorageAction

Step = Callable[[], None]


class Trained:
    """A GPT, a batch, and its steps, plain or with every block checkpointed."""

    def __init__(self, config: GPTConfig, batch: int) -> None:
        torch.manual_seed(0)
        self.config, self.model = config, GPT(config)
        self.tokens = torch.randint(config.vocabulary, (batch, config.context))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.paths = [f"blocks.{n}" for n in range(config.layers)]

    def step(self) -> None:
        """Forward, backward and update."""
        self._finish(self.model(self.tokens, self.tokens))

    def step_checkpointed(self) -> None:
        """The same, every block recomputed from its input."""
        model = self.model
        x = model.token(self.tokens) + model.position.weight[: self.config.context]
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        self._finish(F.cross_entropy(model.head(model.norm(x)).flatten(0, -2), self.tokens.flatten()))

    def _finish(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_bytes(self, step: Step) -> int:
        """The metered peak of a step."""
        gc.collect()
        with memopt.meter(self.model, self.optimizer) as meter:
            step()
        return int(meter.peak_bytes)

    def templates(self) -> dict[str, Template]:
        """What each block saves, seen while a plan that keeps everything runs once."""
        with apply(self.model, plan_of(dict.fromkeys(self.paths, ()))) as handle:
            self.step()
            return {planned.path: template for planned in handle.blocks if (template := planned._templates[0])}


def plan_of(actions: dict[str, tuple[StorageAction, ...]], tier: str = "disk") -> Any:
    """A plan by hand."""
    return SimpleNamespace(blocks=tuple(BlockPlan(p, 0, "", a) for p, a in actions.items()), swap_tier=tier)


def actions_by(templates: dict[str, Template], choose: Callable[[str, str, int], Action]) -> Any:
    """A plan from a function of (block path, name of the operation that makes the storage, its bytes)."""
    actions = {}
    for path, template in templates.items():
        births = template.births()
        actions[path] = tuple(
            StorageAction(
                n, template.sizes[s], choose(path, template.ops[births[s][0]].func.__name__, template.sizes[s])
            )
            for n, s in enumerate(template.saved)
            if template.kinds[s] is Kind.MADE
        )
    return plan_of(actions)


def everything(templates: dict[str, Template], action: Action) -> Any:
    """One action for all."""
    return actions_by(templates, lambda path, name, size: action)


class Switch:
    """Applies a plan for each use; its recorded calls are kept from use to use, so that only the first one records."""

    def __init__(self, model: nn.Module, plan: Any) -> None:
        self.handle = apply(model, plan)
        self.handle.remove()

    def __enter__(self) -> None:
        for planned in self.handle.blocks:
            planned.calls, planned.removed = 0, False
            planned.block.forward = planned

    def __exit__(self, *error: Any) -> None:
        for planned in self.handle.blocks:
            planned.restore()


def timed(variants: dict[str, tuple[Any, Step]], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each variant's step; ``variants`` are (reusable context manager, step)."""
    best = dict.fromkeys(variants, float("inf"))
    for n in range(rounds + 1):
        for name, (context, step) in variants.items():
            with context:
                if n == 0:
                    step()  # under a fresh plan the first step records
                for _ in range(2 if rounds > 10 else 1):
                    began = time.process_time()
                    step()
                    best[name] = min(best[name], time.process_time() - began)
    return best
