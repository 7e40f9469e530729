"""Measures this machine: what ``memopt plan`` should count with instead of a data sheet.

Each figure is the best of a few repetitions, since whatever else runs can only slow one down.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from memopt.planner.devices.table import Hardware, HardwareError, hardware, physical_memory_bytes

_REPEATS = 5


def probe(seconds: float = 10.0) -> Hardware:
    """Measures FLOP/s of large matrix products by dtype, memory bandwidth, the host link and the disk.

    On a machine with GPUs the first one is measured. What cannot be measured (devices that share a link, links between
    devices) comes from the table where the device is in it. Efficiency factors are 1: the rates are measured ones.

    Args:
        seconds: about how long it may take; sizes of the measurements follow from it.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, not {seconds!r}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    share = seconds / 6
    rates = {
        str(dtype).removeprefix("torch."): _matmul_flops(device, dtype, share)
        for dtype in (torch.float32, torch.bfloat16, *((torch.float16,) if cuda else ()))
    }
    written, read = _disk_rates(share)
    outward, inward = _link_rates(device, share) if cuda else (0.0, 0.0)
    known = _known()
    return replace(
        known,
        name=torch.cuda.get_device_name(0) if cuda else platform.processor() or platform.machine() or "cpu",
        kind=("rocm" if torch.version.hip else "cuda") if cuda else "cpu",
        flops_per_second=rates,
        memory_bytes=int(torch.cuda.get_device_properties(0).total_memory) if cuda else physical_memory_bytes(),
        memory_bytes_per_second=_memory_rate(device, share),
        to_host_bytes_per_second=outward,
        from_host_bytes_per_second=inward,
        devices_per_node=max(1, torch.cuda.device_count()) if cuda else 1,
        host_memory_bytes=physical_memory_bytes(),
        disk_write_bytes_per_second=written,
        disk_read_bytes_per_second=read,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        link_efficiency=1.0,
        source=f"measured by memopt probe, torch {torch.__version__}, {torch.get_num_threads()} threads",
        matches=(),
    )


def _known() -> Hardware:
    """The table's entry for this machine; for a device that it does not hold, one that stands alone."""
    try:
        return hardware("auto")
    except HardwareError:
        return replace(hardware("rtx-4090"), devices_per_node=1, link_shared_by=1, peer_bytes_per_second=0.0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _best_seconds(run: Callable[[], object], device: torch.device, limit: float) -> float:
    """The shortest of up to five runs after one to warm up, or fewer when ``limit`` seconds are over."""
    run()
    _wait(device)
    best, stop = float("inf"), time.perf_counter() + limit
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > stop:
            break
    return best


def _matmul_flops(device: torch.device, dtype: torch.dtype, limit: float) -> float:
    """FLOP/s of a square matrix product, grown until it takes a fair share of the time allowed."""
    size, rate = 256, 0.0
    largest = 8192 if device.type == "cuda" else 2048
    stop = time.perf_counter() + limit / 3
    while size <= largest and time.perf_counter() < stop:
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        rate = max(rate, 2 * size**3 / _best_seconds(lambda a=a, b=b: a @ b, device, limit / 6))  # type: ignore[misc]
        size *= 2
    return rate


def _memory_rate(device: torch.device, limit: float) -> float:
    """Bytes per second of adding a number to a tensor far larger than caches: each byte is read and written."""
    count = 2**28 if device.type == "cuda" else 2**25
    values = torch.ones(count, dtype=torch.float32, device=device)
    return 2 * values.nbytes / _best_seconds(lambda: values.add_(1.0), device, limit)


def _link_rates(device: torch.device, limit: float) -> tuple[float, float]:
    """Bytes per second to and from pinned host memory."""
    on_device = torch.empty(2**28, dtype=torch.uint8, device=device)
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    outward = _best_seconds(lambda: pinned.copy_(on_device, non_blocking=True), device, limit / 2)
    inward = _best_seconds(lambda: on_device.copy_(pinned, non_blocking=True), device, limit / 2)
    return pinned.nbytes / outward, pinned.nbytes / inward


def _disk_rates(limit: float) -> tuple[float, float]:
    """Bytes per second of writing a file through to the disk in the folder for temporary files, and of reading it."""
    block = os.urandom(2**20) * 16
    with tempfile.TemporaryDirectory() as folder:
        path, written, start = Path(folder) / "probe", 0, time.perf_counter()
        with path.open("wb", buffering=0) as file:
            while written < 2**28 and time.perf_counter() - start < limit / 2:
                written += file.write(block)
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that reading does not come from the page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        writing = written / (time.perf_counter() - start)
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(len(block)):
                pass
        return writing, written / (time.perf_counter() - start)
