"""What the planner needs to know about a device: rates out of the hardware table."""

from __future__ import annotations

import os

from memopt.planner.devices import Hardware, hardware
from memopt.planner.problem import Rates

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
