"""What the planner needs to know about a device: rates out of the hardware table."""

from __future__ import annotations

import os
from dataclasses import dataclass

from memopt.planner.devices.table import Hardware, hardware


@dataclass(frozen=True)
class Rates:
    """What one device does per second, and how much its swap tier holds.

    ``overlap`` says that copies to and from the tier run beside compute: a block's storages leave until the end of the
    next block's forward and come back from the beginning of the next block's backward on. Without it they leave and
    come back at once, while nothing else runs.
    """

    name: str
    flops_per_second: float
    memory_bytes_per_second: float
    swap_out_bytes_per_second: float
    swap_in_bytes_per_second: float
    host_bytes: int
    tier: str
    overlap: bool

    def seconds(self, flops: int, moved_bytes: int) -> float:
        """Roofline: the longer of computing and of moving."""
        return max(flops / self.flops_per_second, moved_bytes / self.memory_bytes_per_second)


HardwareLike = str | os.PathLike[str] | Hardware | Rates

DISK_BYTES = 2**40  # the table does not say how much the disk holds; the runtime checks what is free


def rates_of(device: HardwareLike, dtype: str) -> Rates:
    """Rates of a device for a model of ``dtype``; with an accelerator swaps go to the host, without one to the disk.

    Raises:
        ValueError: an unknown device.
    """
    if isinstance(device, Rates):
        return device
    found = hardware(device)
    if found.kind == "cpu" or not found.to_host_bytes_per_second:
        out, back, room, tier = found.disk_write_bytes_per_second, found.disk_read_bytes_per_second, DISK_BYTES, "disk"
    else:
        out, back, room, tier = found.sustained_to_host, found.sustained_from_host, found.host_bytes_per_device, "host"
    return Rates(
        name=found.name,
        flops_per_second=found.sustained_flops(dtype),
        memory_bytes_per_second=found.sustained_memory,
        swap_out_bytes_per_second=out,
        swap_in_bytes_per_second=back,
        host_bytes=room,
        tier=tier,
        overlap=found.overlaps and tier == "host",
    )
