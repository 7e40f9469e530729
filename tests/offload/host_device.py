"""A device for tests of the arena: the host's malloc and free behind CUDA's signatures, counted and limited."""

from __future__ import annotations

import ctypes
import itertools

from memopt.offload.static import native as arena_native
from memopt.offload.static.native import DeviceMemory

_GIVE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)
_TAKE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_CLEAR = ctypes.CFUNCTYPE(ctypes.c_int)
_NUMBERS = itertools.count(100)  # beyond any real device
_LIBC = ctypes.CDLL(None)
_LIBC.malloc.restype, _LIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_LIBC.free.restype, _LIBC.free.argtypes = None, [ctypes.c_void_p]
STREAM = 7


class HostDevice:
    """Device memory that lies on the host, with torch's calls of the allocator as methods."""

    def __init__(self, limit_bytes: int = 1 << 40) -> None:
        self.index = next(_NUMBERS)
        self.limit_bytes = limit_bytes
        self.held: dict[int, int] = {}
        self.calls = self.cleared = self.waits = 0
        self.stream = STREAM
        self._callbacks = (_GIVE(self._give), _TAKE(self._take), _CLEAR(self._clear))
        library = arena_native.library()
        assert library is not None
        self._library = library

    @property
    def memory(self) -> DeviceMemory:
        """What an Arena takes."""
        give, take, clear = (ctypes.cast(c, ctypes.c_void_p).value or 0 for c in self._callbacks)
        return DeviceMemory(self.index, give, take, lambda: self.stream, self._wait, clear)

    @property
    def held_bytes(self) -> int:
        """What has been given and not been taken back."""
        return sum(self.held.values())

    def malloc(self, size: int, stream: int = STREAM) -> int:
        """As torch allocates."""
        return int(self._library.arena_malloc(size, self.index, stream))

    def free(self, address: int, size: int, stream: int = STREAM) -> None:
        """As torch frees."""
        self._library.arena_free(address, size, self.index, stream)

    def share(self, address: int, stream: int) -> None:
        """As ``Tensor.record_stream`` tells it."""
        self._library.arena_share(address, stream)

    def _give(self, out: ctypes._Pointer[ctypes.c_void_p], size: int) -> int:
        self.calls += 1
        if self.held_bytes + size > self.limit_bytes:
            return 2
        address = _LIBC.malloc(size)
        out[0] = ctypes.c_void_p(address)
        self.held[address] = size
        return 0

    def _take(self, address: int) -> int:
        del self.held[address]
        _LIBC.free(address)
        return 0

    def _clear(self) -> int:
        self.cleared += 1
        return 0

    def _wait(self) -> None:
        self.waits += 1
