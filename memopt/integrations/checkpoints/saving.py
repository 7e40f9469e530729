"""One save: what it takes from a run, and how it goes on beside the training loop."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from memopt.integrations.checkpoints import restoring
from memopt.integrations.checkpoints.staging import HostCopies
from memopt.integrations.checkpoints.trees import take_apart
from memopt.optim import sharding

VERSION = 1


@dataclass
class Saving:
    """A save under way.

    Attributes:
        step: the step it is named after.
        path: where it will be, and is once it is complete.
        stall_seconds: how long it has kept the caller: waiting for the save before, and copying to the host.
    """

    step: int
    path: Path
    stall_seconds: float
    _written: Future[Any]

    def done(self) -> bool:
        """Whether it is complete on the disk, or has failed."""
        return self._written.done()

    def wait(self) -> Path:
        """Wait until it is complete on the disk.

        Raises:
            RuntimeError: it failed, for example because the disk is full; earlier checkpoints are as they were.
        """
        try:
            self._written.result()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise RuntimeError(f"the checkpoint of step {self.step} could not be written to {self.path}") from error
        return self.path


@dataclass(frozen=True)
class Contents:
    """What one rank saves: tensors by ``file/name``, its plain values as bytes, and text for the files' headers."""

    tensors: dict[str, Tensor]
    rank_bytes: bytes
    notes: dict[str, dict[str, str]]

    def changed_by(self, optimizer: Optimizer) -> frozenset[str]:
        """Names of the tensors that only the optimizer's step changes: its parameters and states."""
        params = {sharding.local_of(p).data_ptr() for group in optimizer.param_groups for p in group["params"]}

        def changed(name: str, tensor: Tensor) -> bool:
            return name.startswith("optimizer/") or sharding.local_of(tensor).data_ptr() in params

        return frozenset(name for name, tensor in self.tensors.items() if changed(name, tensor))


def contents_of(step: int, model: nn.Module, optimizer: Optimizer | None, extra: Any) -> Contents:
    """Everything that continuing from here needs: weights, states, random states and the loop's own ``extra``.

    Raises:
        TypeError: ``extra`` or the state dicts hold something that could not be loaded without running code.
    """
    inner = restoring.unwrapped(model)
    weights, model_rest = take_apart(inner.state_dict())
    tied = restoring.tied_names(inner)
    states, optimizer_rest = take_apart(optimizer.state_dict() if optimizer is not None else None)
    rest = {
        "version": VERSION,
        "step": step,
        "model": model_rest,
        "optimizer": optimizer_rest,
        "extra": extra,
        "random": restoring.random_state(),
    }
    tensors = {f"model/{name}": t for name, t in weights.items() if name not in tied}
    tensors |= {f"optimizer/{name}": t for name, t in states.items()}
    notes = {"model": {"format": "pt", "tied": json.dumps(tied)}, "optimizer": {"format": "pt"}}
    return Contents(tensors, _plain_bytes(rest), notes)


def hold_step_back(optimizer: Optimizer, saving: Saving, copies: HostCopies) -> None:
    """Let the optimizer's next step begin when all is copied; what it waits counts as the save's stall."""
    copied = copies.copied

    def wait(*_: Any) -> None:
        hook.remove()
        began = time.perf_counter()
        if copied is not None:
            copied.result()
        saving.stall_seconds += time.perf_counter() - began

    hook = optimizer.register_step_pre_hook(wait)


def _plain_bytes(rest: Mapping[str, Any]) -> bytes:
    """Plain values as bytes that load without running code.

    Raises:
        TypeError: something in them would not.
    """
    buffer = io.BytesIO()
    try:
        torch.save(rest, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise TypeError(
            "the checkpoint would hold something other than plain values, containers and tensors, which cannot be "
            f"loaded without running code: {' '.join(str(error).split())[:300]}"
        ) from error
    return buffer.getvalue()
