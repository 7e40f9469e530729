"""The answer of the planner, as a value and as a versioned JSON file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from memopt.files import write_whole
from memopt.planner.strict_json import from_json, read_json, to_json
from memopt.planner.values import BlockPlan, Status, Tile, Trace
from memopt.version import __version__

FORMAT_VERSION = 4
READABLE = (1, 2, 3, 4)
"""Version 1 has no digest, and no actions for the inputs of blocks: they are kept; version 2 knows of one
pass, version 3 of no tiles."""


@dataclass(frozen=True)
class Timeline:
    """Resident bytes over one step: from ``seconds[i]`` on, ``by_category[c][i]`` bytes of category ``c``."""

    seconds: tuple[float, ...]
    by_category: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """What happens to every saved storage, what it costs, and how sure that is.

    Sizes are bytes of the whole step on one device: weights, gradients, optimizer state, activations, logits, loss and
    temporaries. ``peak_bytes``, the seconds and the timelines come from ``validate``'s simulation, not from a solver.

    Attributes:
        model: its name.
        model_signature: of its blocks; the runtime compares.
        dtype: of weights and activations.
        hardware: that seconds were modelled for.
        status: ``"optimal"``, ``"feasible"`` (fits, not proven best within ``gap``) or ``"infeasible"``.
        method: how the answer was obtained, in words.
        gap: the step can be at most this share faster under any other plan of the model that the solver saw.
        budget_bytes: what was asked for; ``None`` where no limit was given.
        peak_bytes: of the plan; of the smallest plan found where nothing fits.
        peak_at: the operation at the peak.
        baseline_peak_bytes: of the step without a plan.
        by_category: the bytes at the peak; they sum to ``peak_bytes``.
        smallest_budget_bytes: a budget that does fit, where this one does not.
        binding: what keeps the peak from falling further, in words.
        compute_seconds: forward, backward and optimizer without any action; the step's other seconds are added to it.
        recompute_seconds: of what runs again.
        stall_seconds: waited for swapped storages.
        compression_seconds: of encoding and decoding.
        swap_tier: ``"host"``, ``"disk"`` or ``"none"``.
        swapped_bytes: written to the tier per step; ``host_bytes`` of them at most at a time.
        blocks: the actions, block call by block call; empty where nothing fits.
        timeline_before: live bytes after every operation without the plan.
        timeline_after: the same with it.
        solve_seconds: that planning took.
        passes: forwards and backwards in the step, each under the same actions.
        tiles: modules that run in tiles, because the trace did.
        format_version: of the file.
        memopt_version: that made the plan.
    """

    model: str
    model_signature: str
    dtype: str
    hardware: str
    status: Status
    method: str
    gap: float
    budget_bytes: int | None
    peak_bytes: int
    peak_at: str
    baseline_peak_bytes: int
    by_category: dict[str, int]
    smallest_budget_bytes: int | None
    binding: str
    compute_seconds: float
    recompute_seconds: float
    stall_seconds: float
    compression_seconds: float
    swap_tier: str
    swapped_bytes: int
    host_bytes: int
    blocks: tuple[BlockPlan, ...]
    timeline_before: Timeline
    timeline_after: Timeline
    solve_seconds: float = 0.0
    passes: int = 1
    tiles: tuple[Tile, ...] = ()
    format_version: int = FORMAT_VERSION
    memopt_version: str = __version__

    @property
    def step_seconds(self) -> float:
        """Modelled seconds of one step: compute, recompute, stalls and compression."""
        return self.compute_seconds + self.recompute_seconds + self.stall_seconds + self.compression_seconds

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON with a digest of what it says; the file appears whole or not at all."""
        content = to_json(self)
        content["digest"] = _digest(content)
        write_whole(path, json.dumps(content, separators=(",", ":"), allow_nan=False))

    @classmethod
    def load(cls, path: str | os.PathLike[str], trace: Trace | None = None) -> Plan:
        """Read a plan that ``save`` wrote.

        Args:
            path: the JSON file.
            trace: where given, the plan must have been made for it.

        Raises:
            ValueError: not JSON; written in another format version; a field is unknown, missing or mistyped; changed
                since ``save`` wrote it; made for another model than ``trace``. The message says what differs.
        """
        data = read_json(path, "plan file")
        if not isinstance(data, dict) or "format_version" not in data:
            raise ValueError(f"plan file {path} lacks the field 'format_version'; is it a memopt plan?")
        version = data["format_version"]
        if type(version) is not int or version not in READABLE:
            raise ValueError(
                f"plan file {path} has format version {version!r}, written by memopt "
                f"{data.get('memopt_version', '?')}; memopt {__version__} reads versions "
                f"{READABLE[0]} to {READABLE[-1]}: plan again"
            )
        if version > 1 and "digest" not in data:
            raise ValueError(f"plan file {path} lacks the field 'digest'")
        digest = data.pop("digest", None) if version > 1 else None
        plan = from_json(cls, {**data, "format_version": FORMAT_VERSION}, "plan")
        if version > 1 and digest != _digest(data):
            raise ValueError(f"plan file {path} is not what memopt wrote, its digest differs: plan again")
        if trace is not None:
            plan.check_model(trace)
        return plan

    def check_model(self, trace: Trace) -> None:
        """Refuse a trace of another model, other shapes or another dtype than the plan was made for.

        Raises:
            ValueError: the message names the first thing that differs.
        """
        if self.model_signature == model_signature(trace):
            return
        for what, ours, theirs in (("model", self.model, trace.model), ("dtype", self.dtype, trace.dtype)):
            if ours != theirs:
                raise ValueError(f"the plan was made for {what} {ours}, the trace is of {what} {theirs}: plan again")
        theirs_by_call = {(block.path, block.call): block.signature for block in trace.blocks}
        for mine in self.blocks:
            found = theirs_by_call.get((mine.path, mine.call), "missing")
            if found != mine.signature:
                raise ValueError(
                    f"block {mine.path} (call {mine.call}) of the plan has signature {mine.signature}, in the trace it "
                    f"is {found}: its operations or shapes differ; plan again"
                )
        raise ValueError("the plan was made for another step of this model (optimizer, loss or shapes): plan again")


def _digest(content: Any) -> str:
    """Hash of what a plan file says, whatever the order of its fields."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def model_signature(trace: Trace) -> str:
    """Hash of what a plan depends on: model, dtype, blocks, and the peak of the whole step."""
    text = repr((trace.model, trace.dtype, trace.peak_bytes, [(b.path, b.call, b.signature) for b in trace.blocks]))
    return sha256(text.encode()).hexdigest()[:16]
