"""Coverage-guided fuzzing of every file format that memopt reads: ``python -m tests.faults.fuzzing all 600``.

A target reads bytes as one format's file. It may return, or raise the one error that the format documents; anything
else is a crash, which is kept under ``crashes`` for the tests to repeat. (A hang ends the run after 20 seconds.)
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

CRASHES = Path(__file__).parent / "crashes"


@dataclass(frozen=True)
class Target:
    """One format: how to read a file of it, the error it may raise, and small valid files to start from."""

    read: Callable[[Path], object]
    refuses: type[Exception]
    suffix: str
    seeds: tuple[bytes, ...]

    def consume(self, data: bytes, folder: Path) -> None:
        """Read ``data`` as a file; only the documented error is swallowed."""
        path = folder / f"input{self.suffix}"
        path.write_bytes(data)
        with suppress(self.refuses):
            self.read(path)


def targets() -> dict[str, Target]:
    """Every format by name; imports memopt, so that the caller can instrument it first."""
    sys.modules["transformers"] = None  # type: ignore[assignment]  # memopt's own reader of configs, not transformers'
    from memopt.planner import Plan, find_model, hardware, plan
    from memopt.planner.devices import HardwareError
    from memopt.planner.models import ModelError
    from memopt.planner.placement.csv_file import CsvError, read_csv
    from tests.planner.toy import CPU, transformer

    trace = transformer(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        plan(trace, int(trace.peak_bytes * 0.8), CPU).save(path)
        saved = path.read_bytes()
    table = resources.files("memopt.presets").joinpath("hardware/h100.json").read_bytes()
    gpt2 = b'{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 8}'
    llama = (
        b'{"model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,'
        b' "vocab_size": 16, "intermediate_size": 16, "num_key_value_heads": 1, "num_local_experts": 2,'
        b' "max_position_embeddings": 8}'
    )
    return {
        "plan": Target(Plan.load, ValueError, ".json", (saved,)),
        "hardware": Target(hardware, HardwareError, ".json", (table,)),
        "instance": Target(read_csv, CsvError, ".csv", (b"id,lower,upper,size\na,0,3,4\nb,2,5,8\n",)),
        "config": Target(lambda path: find_model(path, 1, 4), ModelError, ".json", (gpt2, llama)),
    }


def main(name: str, seconds: int) -> None:
    """Fuzz one format, or ``all`` of them in turns, for about ``seconds``."""
    import atheris

    with atheris.instrument_imports(include=["memopt.planner"]):
        known = targets()
    names = list(known) if name == "all" else [name]
    work = tempfile.TemporaryDirectory()
    corpus = Path(work.name, "corpus")
    corpus.mkdir()
    for number, kind in enumerate(names):
        for n, seed in enumerate(known[kind].seeds):
            (corpus / f"{number}-{n}").write_bytes(bytes([number]) + seed)

    def one(data: bytes) -> None:
        if data:
            kind, content = names[data[0] % len(names)], data[1:]
            try:
                known[kind].consume(content, Path(work.name))
            except Exception:
                CRASHES.joinpath(f"{kind}-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)
                raise

    options = ["-timeout=20", "-seed=1", f"-max_total_time={seconds}", f"-artifact_prefix={work.name}/"]
    atheris.Setup([sys.argv[0], str(corpus), *options, "-max_len=60000"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
