"""``Checkpoints``: save while training goes on, find the newest complete checkpoint, continue bitwise."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save
from torch.optim import Optimizer

from memopt.integrations.checkpoints import checksums, folders, restoring
from memopt.integrations.checkpoints.saving import VERSION, Saving, contents_of, hold_step_back
from memopt.integrations.checkpoints.staging import HostCopies, PartPlanner
from memopt.integrations.checkpoints.writer import CheckpointWriter

Result = TypeVar("Result")
PATIENCE_SECONDS = 1.0  # a run that only reads holds the folder while it clears leftovers away


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held beside tensors: the ``step`` it was saved at, and this rank's ``extra``."""

    step: int
    extra: Any


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    ``save`` copies weights and states to the host (on CUDA through pinned memory), and returns; a thread writes the
    copies through torch.distributed.checkpoint while training goes on. A checkpoint appears under its name by one
    rename after all its files have reached the disk, so a run killed at any moment leaves only complete ones.

    With several ranks every rank must make the object and call its methods, in the same order, and the folder must be
    shared; ranks write their own rows of the same files, and another number of ranks can load them. The threads talk
    over a gloo group of their own.

    Args:
        folder: made if missing; one run at a time may write to it, others may load from it meanwhile.
        keep: how many complete checkpoints to leave, the newest.
        overlap: copy the weights and states of a CPU run in a thread too, while the next forward and backward run; the
            optimizer's next step waits for it. Only for loops that change weights nowhere but in ``optimizer.step``.

    Raises:
        ValueError: ``keep`` is less than 1.
        OSError: the folder cannot be made or read; every rank says so.

    Memory: one copy of what is saved, in host memory, from the first save to ``close``.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, overlap: bool = False) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint has to stay; give 1 or more")
        self.folder = Path(folder)
        self.keep = keep
        self.overlap = overlap
        self._group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self._rank = dist.get_rank() if self._group is not None else 0
        self._copies = HostCopies()
        self._saving: Saving | None = None
        self._lock = folders.WriteLock()
        self._on_first_rank(self._open)
        if self._group is None:  # one process is what is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def _agreed(self, work: Callable[[], Result]) -> Result:
        """Do this rank's part of something; what goes wrong on one rank is raised on all, so that none waits for it."""
        error: Exception | None = None
        try:
            result = work()
        except (OSError, TypeError, ValueError) as raised:
            error = raised
        if self._group is not None:
            errors: list[Exception | None] = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(errors, error, self._group)
            error = error or next((one for one in errors if one is not None), None)
        if error is not None:
            raise error
        return result

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        self._agreed(work if self._rank == 0 else lambda: None)

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock.take(self.folder):  # else a run is writing, and what it has begun is no leftover
            folders.sweep(self.folder)
            self._lock.release()

    def _claim(self, path: Path) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not (taken := self._lock.take(self.folder)) and time.monotonic() < until:
            time.sleep(0.05)
        if not taken:
            raise BlockingIOError(
                f"another run is saving checkpoints to {self.folder}: give this one a folder of its own, or close() "
                "the other Checkpoints"
            )
        if path.exists() and not folders.is_own(path):
            raise FileExistsError(f"{path} is there and is no checkpoint: move it away, or choose another folder")

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in ascending order."""
        return folders.steps(self.folder)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        extra: Any = None,
        blocking: bool = False,
    ) -> Saving:
        """Save a model, its optimizer and this process's random state; returns as soon as all is copied to the host.

        A save still under way is waited for first. Training may go on at once.

        Args:
            step: names the checkpoint; a complete one of the same step is replaced.
            model: as trained; DDP's and torch.compile's wrappers leave no trace in the names of the weights.
            optimizer: any torch optimizer.
            extra: what else the loop needs, each rank its own: plain values, containers of them, and tensors.
            blocking: wait until the checkpoint is complete.

        Raises:
            BlockingIOError: another run is writing to the folder.
            FileExistsError: something that is no checkpoint has the name that this one would have.
            RuntimeError: the save before this one failed.
            TypeError: ``extra`` or the state dicts hold something that could not be loaded without running code.
            ValueError: a step below 0; or ``overlap`` with an optimizer that updates inside backward.
        """
        began = time.perf_counter()
        if step < 0:
            raise ValueError(f"step={step}: give a whole number from 0 up")
        if self.overlap and getattr(optimizer, "_released", None) is not None:
            raise ValueError(
                "overlap=True, but the optimizer updates inside backward (release_gradients): leave it off"
            )
        self.wait()
        self._on_first_rank(lambda: self._claim(folders.path_of(self.folder, step)))
        contents = self._agreed(lambda: contents_of(step, model, optimizer, extra))
        writer = CheckpointWriter(
            folder=self.folder,
            step=step,
            keep=self.keep,
            rank=self._rank,
            rank_bytes=contents.rank_bytes,
            notes=contents.notes,
        )
        later = contents.changed_by(optimizer) if self.overlap and optimizer is not None else frozenset()
        self._copies.later = later
        response = async_save(
            contents.tensors,
            storage_writer=writer,
            planner=PartPlanner(),
            process_group=self._group,
            async_stager=self._copies,
            no_dist=self._group is None,
        )
        written = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
        saving = Saving(step, folders.path_of(self.folder, step), 0.0, written)
        if later and optimizer is not None:
            hold_step_back(optimizer, saving, self._copies)
        saving.stall_seconds += time.perf_counter() - began
        self._saving = saving
        if blocking:
            self.wait()
        return saving

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        step: int | None = None,
        verify: bool = True,
    ) -> Loaded | None:
        """Continue from a checkpoint: weights, states and, on as many ranks as saved it, random states.

        Args:
            model: takes the weights, whatever way it is sharded now.
            optimizer: takes the states; on ordinary parameters memopt's optimizers also take torch's of their rule.
            step: which checkpoint; the newest by default. Going back to an earlier one leaves later ones in place.
            verify: hold every byte against its checksum first, which reads the checkpoint once more; ranks share it.

        Returns:
            The step and this rank's ``extra`` (the first rank's where more ranks load than saved), or None where
            there is no checkpoint yet.

        Raises:
            FileNotFoundError: ``step`` names no complete checkpoint.
            ValueError: the checkpoint is damaged, or of another model or optimizer: the message says what differs.
                Names, shapes and types are checked before anything is changed.
        """
        self.wait()
        found = self.steps()
        if step is None and not found:
            return None
        chosen = found[-1] if step is None else step
        if chosen not in found:
            raise FileNotFoundError(f"{self.folder} has no complete checkpoint of step {chosen}; it has {found}")
        path = folders.path_of(self.folder, chosen)
        if verify:
            self._agreed(lambda: self._verify(path))
        rest = self._agreed(lambda: restoring.restore(path, self._rank, VERSION, model, optimizer))
        return Loaded(rest["step"], rest["extra"])

    def _verify(self, path: Path) -> None:
        shares = 1 if self._group is None else dist.get_world_size(self._group)
        fault = checksums.fault(path, self._rank, shares)
        if fault is not None:
            raise ValueError(f"{fault}; nothing loaded, choose another step of {self.steps()}")

    def wait(self) -> None:
        """Wait until the save under way, if any, is complete.

        Raises:
            RuntimeError: it failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.wait()

    def close(self) -> None:
        """Wait for the save under way and give the host memory back."""
        try:
            self.wait()
        finally:
            self._copies.close()
            self._lock.release()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
