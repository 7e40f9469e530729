"""Writes one checkpoint for torch.distributed.checkpoint: each rank its parts, then one rename by one rank."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from memopt.integrations.checkpoints import checksums, folders
from memopt.integrations.checkpoints.checksums import Piece
from memopt.integrations.checkpoints.tensor_file import Entry, lay_out, write_part

FILES = ("model", "optimizer")  # the first part of every tensor's name, and the file it lies in


def file_of(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.safetensors"


def rank_file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


@dataclass
class CheckpointWriter(StorageWriter):
    """One save. Nothing is visible under the checkpoint's name before ``finish``, which only the coordinator calls.

    Args:
        folder: of all checkpoints.
        step: of this one.
        keep: how many to leave.
        rank: of this process.
        rank_bytes: what this rank's own file holds.
        notes: text for the header of each file of ``FILES``.
    """

    folder: Path
    step: int
    keep: int
    rank: int
    rank_bytes: bytes
    notes: Mapping[str, Mapping[str, str]]
    _headers: list[Piece] = field(default_factory=list, init=False)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up before the plan is known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Every rank's plan is written as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder and the files' headers, and tell every rank where its parts lie. Coordinator only."""
        wanted: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {kind: {} for kind in FILES}
        for item in (item for plan in plans for item in plan.items):
            kind, name = item.index.fqn.split("/", 1)
            if item.tensor_data is not None:
                wanted[kind][name] = (item.tensor_data.properties.dtype, tuple(item.tensor_data.size))
        partial = folders.partial_of(self.folder, self.step)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        layout: dict[str, dict[str, Entry]] = {}
        for kind, tensors in wanted.items():
            if not tensors:
                continue
            header, layout[kind] = lay_out(tensors, self.notes.get(kind, {}))
            with file_of(partial, kind).open("xb") as file:
                file.write(header)
                self._headers.append(Piece(file_of(partial, kind).name, 0, len(header), zlib.crc32(header)))
                file.truncate(max((entry.stop for entry in layout[kind].values()), default=len(header)))
        return [replace(plan, storage_data=layout) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's parts and its own file, and wait until they have reached the disk."""
        partial = folders.partial_of(self.folder, self.step)
        layout: dict[str, dict[str, Entry]] = plan.storage_data
        results = []
        for kind, entries in layout.items():
            descriptor = os.open(file_of(partial, kind), os.O_WRONLY)
            try:
                for item in plan.items:
                    of, name = item.index.fqn.split("/", 1)
                    if of == kind:
                        part = cast(Tensor, planner.resolve_data(item))
                        sums = write_part(descriptor, entries[name], part, tuple(item.index.offset or ()))
                        pieces = [Piece(file_of(partial, kind).name, *piece) for piece in sums]
                        results.append(WriteResult(index=item.index, size_in_bytes=part.nbytes, storage_data=pieces))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        with rank_file_of(partial, self.rank).open("xb") as file:
            file.write(self.rank_bytes)
            file.flush()
            os.fsync(file.fileno())
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Every rank has written: gather the checksums, and give the checkpoint its name."""
        partial = folders.partial_of(self.folder, self.step)
        pieces = [*self._headers, *(checksums.of_file(path) for path in partial.glob("rank-*"))]
        pieces += [piece for of_rank in results for result in of_rank for piece in result.storage_data]
        checksums.write(partial, pieces)
        folders.commit(self.folder, self.step, self.keep)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by an id."""
        return False
