"""The native libraries under the compiler's sanitizers: a few rules, formats and codecs, and everything else.

``MEMOPT_SANITIZE=all`` takes every one of them; ``MEMOPT_SANITIZE="all codecs losses"`` those parts alone.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = {
    "memory": ("-fsanitize=address,undefined -fno-sanitize-recover=undefined", ("libasan.so", "libubsan.so")),
    "threads": (f"-fsanitize=thread -include {HERE / 'threads.hpp'}", ("libtsan.so",)),
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
    # The dynamic loader hands a dead thread's storage on without telling the sanitizer.
    "TSAN_OPTIONS": f"exitcode=66:suppressions={HERE / 'threads.supp'}",
}
BROKEN = {
    "memory": 'extern "C" int run() { int* volatile p = new int[4]; int x = p[4]; delete[] p; return x; }',
    "threads": """
#include <thread>
extern "C" int run() { int n = 0; auto add = [&] { for (int i = 0; i < 1000; ++i) ++n; };
            std::thread a(add), b(add); a.join(); b.join(); return n; }""",
}
CONTROL = """
import sys
from memopt.native_build import build
build("broken", sys.stdin.read()).run()
"""


def sanitized(check: str, cache: Path, *arguments: str, source: str = "") -> subprocess.CompletedProcess[str]:
    """A Python process with the sanitizer's runtime, whose native libraries are built for it."""
    flags, runtimes = CHECKS[check]
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in runtimes
    ]
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": " ".join(paths),
        "MEMOPT_CACHE": str(cache),
        "MEMOPT_CPU_FLAGS": f"-march=native -O0 -g1 {flags}",
        "MEMOPT_KERNELS": "native",
        "CXX": "g++",
        "OMP_NUM_THREADS": "2",
    }
    # ThreadSanitizer wants the addresses that a process has without randomisation.
    command = ["setarch", platform.machine(), "-R", sys.executable, "-W", "error::RuntimeWarning", *arguments]
    return subprocess.run(
        command, env=environment, cwd=HERE.parents[1], input=source, capture_output=True, text=True, timeout=1500
    )


@pytest.mark.parametrize("check", CHECKS)
def test_the_sanitizer_sees_a_fault(check: str, tmp_path: Path) -> None:
    run = sanitized(check, tmp_path, "-c", CONTROL, source=BROKEN[check])
    assert run.returncode != 0
    assert {"memory": "heap-buffer-overflow", "threads": "data race"}[check] in run.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_native_kernels_are_clean(check: str, tmp_path: Path) -> None:
    chosen = os.environ.get("MEMOPT_SANITIZE", "few").split()
    run = sanitized(check, tmp_path, "-m", "tests.faults.exercise", *chosen)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "exercised"
