"""Building and caching native libraries: no compiler, bad folders, races; and the portable paths of the vectors."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from memopt import native_build

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native_build, "_LOADED", {})
    monkeypatch.setattr(native_build, "_WARNED", set())
    monkeypatch.setattr(native_build.tempfile, "tempdir", str(tmp_path))


def test_builds_once_and_finds_it_again(tmp_path: Path) -> None:
    library = native_build.build("answer", SOURCE)
    assert library is not None
    assert library.answer() == 42
    (built,) = (tmp_path / "cache").iterdir()
    stamp = built.stat().st_mtime_ns
    native_build._LOADED.clear()
    assert native_build.build("answer", SOURCE) is not None
    assert built.stat().st_mtime_ns == stamp
    assert native_build.build("answer", SOURCE, ["-DOTHER"]) is not None
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_key_names_processor_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command, _ = native_build.find_compiler()
    native_build.build("answer", SOURCE)
    monkeypatch.setattr(native_build, "cpu_identity", lambda: "another processor")
    native_build.build("answer", SOURCE)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(native_build, "find_compiler", lambda: (command, "another compiler"))
    native_build.build("answer", SOURCE)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_processor_is_its_model_and_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    here = "vendor_id : A\nmodel name : B\nflags : sse avx\ncpu MHz : 1000\n"

    def identity(text: str) -> str:
        monkeypatch.setattr(Path, "read_text", lambda self: text)
        return native_build.cpu_identity.__wrapped__()

    assert identity(here.replace("1000", "2000")) == identity(here.replace("sse avx", "avx sse")) == identity(here)
    for change in (("avx", "avx avx2"), ("name : B", "name : C"), ("vendor_id : A", "vendor_id : Z")):
        assert identity(here.replace(*change)) != identity(here)


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert native_build.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MEMOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert native_build.cache_folder() == Path("/x/memopt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native_build.cache_folder() == Path(os.path.expanduser("~/.cache/memopt"))


def test_unusable_cache_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert native_build.build("answer", SOURCE) is not None
    assert list(tmp_path.glob("memopt-*/answer-*.so"))


def test_truncated_library_is_not_fatal(tmp_path: Path) -> None:
    assert native_build.build("answer", SOURCE) is not None
    (built,) = (tmp_path / "cache").iterdir()
    native_build._LOADED.clear()
    built.unlink()
    built.write_bytes(b"not a library")
    library = native_build.build("answer", SOURCE)
    assert library is not None
    assert library.answer() == 42


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
        assert native_build.build("answer", SOURCE) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native_build.build("answer", SOURCE) is None  # warned already


def test_source_that_does_not_compile() -> None:
    with pytest.warns(RuntimeWarning, match="could not build native kernels"):
        assert native_build.build("answer", "this is not C++") is None


def test_two_processes_at_once(tmp_path: Path) -> None:
    script = f"from memopt import native_build as n; assert n.build('answer', {SOURCE!r}).answer() == 42"
    jobs = [subprocess.Popen([sys.executable, "-W", "error", "-c", script], env=dict(os.environ)) for _ in range(2)]
    assert [job.wait(120) for job in jobs] == [0, 0]
    assert len(list((tmp_path / "cache").glob("*"))) == 1


PORTABLE = r"""
import torch
from tests.kernels import step_cases as cases
from memopt.kernels import get_codec, quantize_blockwise
import os
for name in ("root4", "nf4", "e4m3"):
    for x in cases.data_families((3, 700), get_codec(name).signed).values():
        assert cases.brute_force_excess(x, quantize_blockwise(x, name)).max() <= 0, name
kinds = (cases.ODD_SHAPES, ("sq127", "sqrt"), torch.float16, torch.bfloat16)
before, _ = cases.run_adamw(*kinds, 0)
ours, our_states = cases.run_adamw(*kinds, 1, param_rounding="stochastic")
os.environ["MEMOPT_KERNELS"] = "torch"
oracle, states = cases.run_adamw(*kinds, 1, param_rounding="stochastic")
for a, b, start in zip(ours, oracle, before):
    cases.check_parameters(a, b, start)
for stored, our_stored in zip(states, our_states):
    for a, b in zip(stored, our_stored):
        cases.check_state(b, a)
cases.check_slow_decay()
"""


@pytest.mark.parametrize("flags", ["-mavx2 -mfma -mf16c", "-msse2"])
def test_portable_vectors(flags: str) -> None:
    """What other processors get, compiled and run here."""
    if os.uname().machine != "x86_64":
        flags = ""
    environment = {**os.environ, "MEMOPT_CPU_FLAGS": flags, "MEMOPT_KERNELS": "native"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PORTABLE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
