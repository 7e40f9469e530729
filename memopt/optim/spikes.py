"""SPAM's two remedies for gradient spikes, as options of AdamW: clipping, and moments that start anew.

Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", 2025. We differ in one respect:
gradients are held against the second moment with its bias corrected, so that the first steps after a start or a reset
are not clipped for the moment's smallness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from memopt.kernels import Update
from memopt.kernels.math import sign, sqrt, where
from memopt.optim import checks

_NO_LIMIT = 3e38


@lru_cache(maxsize=8)
def clipped(update: Update) -> Update:
    """The same rule on gradients whose square is at most ``spike_threshold`` times their second moment.

    Where the moment is 0 nothing is known yet and nothing is clipped.
    """
    number = next(i for i, spec in enumerate(update.states) if spec.name == "exp_avg_sq")

    def fn(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, ...]:
        limit = s.spike_threshold * states[number]
        spike = (g * g > limit) & (states[number] > 0.0)
        return update.fn(p, where(spike, sign(g) * sqrt(limit), g), states, s)

    return replace(update, name=f"{update.name}_clipped", scalars=(*update.scalars, "spike_threshold"), fn=fn)


def check(group: Mapping[str, Any]) -> None:
    """The three options of AdamW."""
    if group["spike_threshold"] is not None:
        checks.positive(group, "spike_threshold")
    if group["reset_every"] is not None:
        checks.whole(group, "reset_every", minimum=1)
    checks.whole(group, "reset_warmup")


def since_reset(group: Mapping[str, Any], step: int) -> int:
    """The step counted from the last reset, 1 for the first after it."""
    every = group["reset_every"]
    return step if every is None else (step - 1) % every + 1


def after_reset(group: Mapping[str, Any], step: int) -> float:
    """What the learning rate is multiplied by: a cosine from 0 to 1 over the warm-up that follows a reset."""
    every, warmup = group["reset_every"], group["reset_warmup"]
    if every is None or step <= every or since_reset(group, step) >= warmup:
        return 1.0
    return 0.5 * (1.0 - math.cos(math.pi * since_reset(group, step) / warmup))


def adjusted(scalars: Mapping[str, float], group: Mapping[str, Any], step: int) -> dict[str, float]:
    """AdamW's scalars for this step, those of a step counted from the last reset, with SPAM's changes.

    At a reset the old moments are multiplied by 0: no pass of its own is needed.
    """
    changed = dict(scalars)
    changed["step_size"] *= after_reset(group, step)
    if since_reset(group, step) == 1 and step > 1:
        changed |= {"beta1": 0.0, "beta2": 0.0}
    if group["spike_threshold"] is not None:
        known = since_reset(group, step) - 1  # steps that the moment has seen
        bias = 1.0 - float(group["betas"][1]) ** known
        limit = float(group["spike_threshold"]) / bias / scalars["grad_scale"] ** 2 if known else _NO_LIMIT
        changed["spike_threshold"] = min(limit, _NO_LIMIT)  # gradients are compared as they come
    return changed
