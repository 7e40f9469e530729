"""The compiled allocator behind :class:`memopt.offload.Arena`, and where it gets a device's memory from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memopt.native_build import build

OFF, RECORD, REPLAY = 0, 1, 2
ALLOCATED, FREED, SHARED = 0, 1, 2
UNPLANNED = -1
GRANULE_BYTES = 512

_SOURCE = Path(__file__).parent.parent / "native" / "arena.cpp"
_INSTALLED: list[object] = []  # what torch was given; it has to live as long as the process


class Counters(NamedTuple):
    """Of the step under way or the last one; bytes are those of now."""

    allocations: int
    hits: int
    changed: int
    late: int
    changed_at: int
    changed_bytes: int
    planned_bytes: int  # of the allocation at ``changed_at``; 0 where the plan ends before it
    region_bytes: int
    retired_bytes: int
    passed_bytes: int
    cached_bytes: int
    lingering: int


@dataclass(frozen=True)
class DeviceMemory:
    """Addresses of C functions with CUDA's signatures, and two Python functions about the device.

    ``malloc`` is ``int (*)(void **, size_t)``, ``free`` is ``int (*)(void *)``, ``clear_error`` is ``int (*)()`` or 0.
    ``stream`` tells the address of the current stream, ``synchronize`` waits for the device.
    """

    index: int
    malloc: int
    free: int
    stream: Callable[[], int]
    synchronize: Callable[[], None]
    clear_error: int = 0


@cache
def library() -> ctypes.CDLL | None:
    """The compiled allocator; None, after a warning, where there is no compiler."""
    found = build("arena", _SOURCE.read_text(encoding="utf-8"), openmp=False)
    if found is None:
        return None
    pointer, i64, array = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "arena_open": (None, [ctypes.c_int, pointer, pointer, pointer]),
        "arena_malloc": (pointer, [ctypes.c_ssize_t, ctypes.c_int, pointer]),
        "arena_free": (None, [pointer, ctypes.c_ssize_t, ctypes.c_int, pointer]),
        "arena_share": (None, [pointer, pointer]),
        "arena_begin": (None, [ctypes.c_int, ctypes.c_int, pointer]),
        "arena_end": (None, [ctypes.c_int]),
        "arena_log": (i64, [ctypes.c_int, array, i64]),
        "arena_adopt": (pointer, [ctypes.c_int, i64, array, array, i64]),
        "arena_retire": (None, [ctypes.c_int]),
        "arena_settle": (None, [ctypes.c_int]),
        "arena_counters": (None, [ctypes.c_int, array]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


class NativeArena:
    """One device's part of the compiled allocator."""

    def __init__(self, functions: ctypes.CDLL, memory: DeviceMemory) -> None:
        self._functions, self.index = functions, memory.index
        functions.arena_open(memory.index, memory.malloc, memory.free, memory.clear_error)

    def begin(self, mode: int, stream: int) -> None:
        """A step begins: ``RECORD`` or ``REPLAY``."""
        self._functions.arena_begin(self.index, mode, stream)

    def end(self) -> None:
        """A step has ended: allocations go to the device until the next one."""
        self._functions.arena_end(self.index)

    def log(self) -> list[tuple[int, int, int]]:
        """What the last recorded step did, in order: kind, which allocation, bytes."""
        count = self._functions.arena_log(self.index, (ctypes.c_int64 * 0)(), 0)
        numbers = (ctypes.c_int64 * count)()
        self._functions.arena_log(self.index, numbers, count)
        return list(zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True))

    def adopt(self, sizes: Sequence[int], offsets: Sequence[int], region_bytes: int) -> int | None:
        """Takes over a plan; the address of its region, None where the device has no memory for it."""
        array = ctypes.c_int64 * len(sizes)
        base = self._functions.arena_adopt(self.index, len(sizes), array(*sizes), array(*offsets), region_bytes)
        return None if base is None else int(base)

    def retire(self) -> None:
        """Gives the plan up, and the memory that nothing lives in any more."""
        self._functions.arena_retire(self.index)

    def settle(self) -> None:
        """The device is idle: what was freed while other streams used it is free now."""
        self._functions.arena_settle(self.index)

    def counters(self) -> Counters:
        """See :class:`Counters`."""
        numbers = (ctypes.c_int64 * len(Counters._fields))()
        self._functions.arena_counters(self.index, numbers)
        return Counters(*numbers)


def cuda_memory(functions: ctypes.CDLL, index: int | None) -> DeviceMemory:
    """Makes the compiled allocator torch's own for CUDA, once a process, and returns a device's memory.

    Raises:
        RuntimeError: CUDA has been used already, or this build of torch cannot be told of streams.
    """
    if not _INSTALLED:
        _install(functions)
    device = torch.cuda.current_device() if index is None else index
    malloc, free, clear = (_runtime_address(name) for name in ("cudaMalloc", "cudaFree", "cudaGetLastError"))
    return DeviceMemory(
        index=device,
        malloc=malloc,
        free=free,
        clear_error=clear,
        stream=lambda: int(torch.cuda.current_stream(device).cuda_stream),
        synchronize=lambda: torch.cuda.synchronize(device),
    )


def _install(functions: ctypes.CDLL) -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "CUDA has been used already, and torch changes its allocator only before that: make the Arena before the "
            "first CUDA tensor"
        )
    for index in range(torch.cuda.device_count()):  # every device's tensors come to it from now on
        addresses = (_runtime_address(name) for name in ("cudaMalloc", "cudaFree", "cudaGetLastError"))
        functions.arena_open(index, *addresses)
    # The class takes a path, and would open the library again; the functions of the one that is open are needed.
    inner = torch._C._cuda_customAllocator(_address(functions.arena_malloc), _address(functions.arena_free))
    tell = getattr(inner, "set_record_stream_fn", None)
    if tell is None:
        raise RuntimeError("this build of torch does not tell a pluggable allocator of record_stream; update torch")
    tell(_address(functions.arena_share))
    torch._C._cuda_changeCurrentAllocator(inner)
    _INSTALLED.append(inner)


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


@cache
def _runtime_address(name: str) -> int:
    """Of a function of the CUDA runtime that torch has loaded."""
    for path in (None, *_loaded("libcudart")):
        function = getattr(ctypes.CDLL(path), name, None)
        if function is not None:
            return _address(function)
    raise RuntimeError(f"{name} not found: torch has not loaded a CUDA runtime library (libcudart)")


def _loaded(stem: str) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if f"/{stem}" in line})
