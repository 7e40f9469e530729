"""Copies in host memory of what a checkpoint holds, so that training can go on while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from memopt.optim import sharding


def offsets_of(tensor: Tensor) -> tuple[int, ...]:
    """Where, in each dimension of the whole tensor, the part held here begins."""
    if not sharding.is_sharded(tensor):
        return (0,) * tensor.dim()
    (chunk,) = cast(Any, tensor).__create_chunk_list__()
    return tuple(chunk.offsets)


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor, copied to the host; torch.distributed.checkpoint asks it what to write."""

    local: Tensor
    shape: torch.Size
    offsets: tuple[int, ...]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if self.local.numel() == 0 and self.shape.numel() > 0:
            return []  # more ranks than rows
        offsets = torch.Size(self.offsets)
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=self.local.shape)
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=self.local.dtype), size=self.shape)
        return [WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=data)]


class PartPlanner(DefaultSavePlanner):
    """torch.distributed.checkpoint's plan of who writes what, over a state dict of parts."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The part to write."""
        part: Part = self.state_dict[index.fqn]
        return part.local


class HostCopies:
    """Copies tensors to the host, into the same buffers at every save; pinned ones where an accelerator copies.

    It costs the bytes of everything saved, once, in host memory, from the first save until ``close``.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="memopt-host-copies")
        self.later: frozenset[str] = frozenset()
        self.copied: Future[dict[str, Part]] | None = None

    def stage(self, tensors: Mapping[str, Tensor]) -> Future[dict[str, Part]] | dict[str, Part]:
        """Copy every tensor's local part.

        What is asked of an accelerator's current stream afterwards may change its tensors at once: the copy comes
        before it on the same stream. Tensors on the CPU may change as soon as this returns, but those named in
        ``later`` only when ``copied`` is done.
        """
        for name in self._buffers.keys() - tensors.keys():
            del self._buffers[name]
        devices = {sharding.local_of(tensor).device for tensor in tensors.values()}
        streams = [torch.accelerator.current_stream(d) for d in devices if d.type not in ("cpu", "meta")]
        late = [n for n, t in tensors.items() if n in self.later and sharding.local_of(t).device.type == "cpu"]
        parts = {name: self._copy(name, tensor) for name, tensor in tensors.items() if name not in late}
        enqueued = [stream.record_event() for stream in streams]

        def finish() -> dict[str, Part]:
            parts.update({name: self._copy(name, tensors[name]) for name in late})
            for event in enqueued:
                event.synchronize()
            return parts

        self.copied = self._thread.submit(finish) if late or enqueued else None
        return self.copied or parts

    @torch.no_grad()
    def _copy(self, name: str, tensor: Tensor) -> Part:
        local = sharding.local_of(tensor)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            pinned = local.device.type != "cpu"
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=pinned)
            self._buffers[name] = buffer
        buffer.copy_(local, non_blocking=True)
        return Part(buffer, tensor.shape, offsets_of(tensor))

    # What follows completes torch.distributed.checkpoint's protocol of a stager.
    _synchronize_after_execute = False

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether ``synchronize_staging`` has anything to wait for."""
        return self._synchronize_after_execute

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for."""

    def close(self) -> None:
        """Give the buffers back; nothing can be staged afterwards."""
        self._thread.shutdown()
        self._buffers.clear()
