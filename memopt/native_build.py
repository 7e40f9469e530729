"""Builds small C++ libraries on first use and keeps them in the user's cache folder.

A leaf module: it imports nothing from memopt, so that every room may use it. A library is plain C++17 with an
``extern "C"`` interface, without torch headers, loaded by ctypes. The cache key is the source, the flags, the
compiler's identity and the CPU's features, so a cache that is copied to another machine is never loaded there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

BASE_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_SECONDS = 120.0
_LOCK = threading.RLock()
_LOADED: dict[str, ctypes.CDLL | None] = {}
_WARNED: set[str] = set()
_FORKED = threading.Event()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_FORKED.set)


def build(name: str, source: str, flags: Sequence[str] = (), *, openmp: bool = True) -> ctypes.CDLL | None:
    """Compiles ``source`` once per machine and loads it; ``None``, with one warning, where that is impossible.

    Args:
        name: a short file-name stem, such as ``"step_adamw"``; it plays no part in the cache key.
        source: one whole C++17 translation unit with ``extern "C"`` entry points.
        flags: compiler flags added after ``BASE_FLAGS`` and :func:`cpu_flags`.
        openmp: compile with ``-fopenmp``. Each call into the library should pass ``torch.get_num_threads()`` on.

    Cost: one compiler run the first time on a machine, a file look-up and ``dlopen`` in later processes, a dictionary
    look-up afterwards. Safe with several threads and processes at once: a library appears under its name whole.
    """
    compiler = find_compiler()
    if compiler is None:
        _warn("compiler", "memopt: no C++ compiler found (CXX, c++, g++, clang++); using the slower torch kernels")
        return None
    command, identity = compiler
    arguments = [*BASE_FLAGS, *cpu_flags(), *(["-fopenmp"] if openmp else []), *flags]
    key = hashlib.sha256("\0".join([source, *arguments, identity, cpu_identity()]).encode()).hexdigest()[:24]
    with _LOCK:
        if key not in _LOADED:
            _LOADED[key] = _load_or_compile(f"{name}-{key}", source, [*command, *arguments])
        return _LOADED[key]


def _load_or_compile(stem: str, source: str, command: list[str]) -> ctypes.CDLL | None:
    problem = "no folder for compiled kernels is writable"
    for folder in _folders():
        target = folder / f"{stem}.so"
        try:
            if target.exists():
                return ctypes.CDLL(str(target))
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
                cpp, so = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
                cpp.write_text(source)
                run = subprocess.run(
                    [*command, "-o", str(so), str(cpp)], capture_output=True, text=True, timeout=_SECONDS, check=False
                )
                if run.returncode != 0:
                    problem = run.stderr.strip()[-2000:] or f"exit status {run.returncode}"
                    break
                library = ctypes.CDLL(str(so))
                os.replace(so, target)
                return library
        except subprocess.TimeoutExpired:
            problem = f"the compiler took more than {_SECONDS:.0f} s"
            break
        except OSError as error:  # a read-only or full folder, a library that does not load: try the next folder
            problem = str(error)
    _warn(stem, f"memopt: could not build native kernels ({problem}); using the slower torch kernels")
    return None


def cache_folder() -> Path:
    """``$MEMOPT_CACHE``, else ``$XDG_CACHE_HOME/memopt``, else ``~/.cache/memopt``."""
    if chosen := os.environ.get("MEMOPT_CACHE"):
        return Path(chosen)
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root, "memopt")
    return Path(os.path.expanduser("~"), ".cache", "memopt")


def _folders() -> list[Path]:
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    shared = Path(tempfile.gettempdir(), f"memopt-{user}")
    folders = [cache_folder()]
    # A temporary folder is open to everyone: take it only where it is ours, so that no other user's code is loaded.
    if not shared.exists() or (hasattr(os, "getuid") and shared.stat().st_uid == os.getuid()):
        folders.append(shared)
    return folders


def find_compiler() -> tuple[list[str], str] | None:
    """The command and the identity (its file) of the C++ compiler in use; ``None`` where there is none."""
    return _find_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=8)
def _find_compiler(cxx: str, path: str) -> tuple[list[str], str] | None:
    for command in [shlex.split(cxx)] if cxx else [["c++"], ["g++"], ["clang++"]]:
        executable = shutil.which(command[0], path=path)
        if executable is not None:
            # The file itself identifies a compiler; asking it for its version would cost a process at every start.
            target = os.path.realpath(executable)
            stat = os.stat(target)
            return [executable, *command[1:]], f"{target} {stat.st_size} {stat.st_mtime_ns}"
    return None


def cpu_flags() -> tuple[str, ...]:
    """Compiler flags for this CPU: ``MEMOPT_CPU_FLAGS`` where set (shell words), else ``-march=native``."""
    if (forced := os.environ.get("MEMOPT_CPU_FLAGS")) is not None:
        return tuple(shlex.split(forced))
    if platform.machine().lower() in ("x86_64", "amd64"):
        return ("-march=native",)
    return ("-mcpu=native",) if platform.machine().lower() in ("aarch64", "arm64") else ()


@functools.cache
def cpu_identity() -> str:
    """What compiled code may rely on: the architecture, the processor's model and its feature flags."""
    parts = [sys.platform, platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for field in ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part"):
        found = next((line for line in lines if line.split(":")[0].strip() == field), "")
        parts.append(" ".join(sorted(found.split())))
    return "\n".join(parts)


def threads() -> int:
    """How many OpenMP threads a native kernel should use now: as many as torch does; one in a forked process.

    A fork copies no threads, and the OpenMP library of GCC waits forever for those that it had started before.
    """
    return 1 if _FORKED.is_set() else torch.get_num_threads()


def _warn(key: str, text: str) -> None:
    if key not in _WARNED:
        _WARNED.add(key)
        warnings.warn(text, RuntimeWarning, stacklevel=4)
