"""Coverage-guided fuzzing of every file format that memopt reads: ``python -m tests.faults.fuzzing all 600``.

A target reads bytes as one format's file. It may return, or raise the one error that the format documents; anything
else is a crash, which is kept under ``crashes`` for the tests to repeat. (A hang ends the run after a minute.)

Half of the inputs are bytes changed at random; the other half are JSON of the right form in which one value is
another, missing or double, with a plan's digest and a tensor file's length put right: they reach what lies behind.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

CRASHES = Path(__file__).parent / "crashes"
LARGEST = 60_000  # bytes of an input
ODD = (None, True, 0, 1, -1, 2, 7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "0", [], {})


@dataclass(frozen=True)
class Target:
    """One format: how to read a file of it, the error it may raise, and small valid files to start from.

    ``json_of`` and ``with_json`` take the JSON out of a file and put another one in; None where a file has none.
    """

    read: Callable[[Path], object]
    refuses: type[Exception]
    name: str
    seeds: tuple[bytes, ...]
    json_of: Callable[[bytes], Any] | None = json.loads
    with_json: Callable[[Any], bytes] = lambda values: json.dumps(values).encode()

    def consume(self, data: bytes, folder: Path) -> None:
        """Read ``data`` as a file; only the documented error is swallowed."""
        path = folder / self.name
        path.write_bytes(data)
        with suppress(self.refuses):
            self.read(path)

    def changed(self, data: bytes, draw: random.Random) -> bytes | None:
        """The file with a value or two of its JSON changed; None where it holds none."""
        if self.json_of is None:
            return None
        try:
            tree = self.json_of(data)
            for _ in range(draw.choice((1, 1, 2, 4))):
                tree = _change(tree, draw)
            return self.with_json(tree)
        except (ValueError, RecursionError):
            return None


def _change(tree: Any, draw: random.Random) -> Any:
    """One value somewhere in the tree becomes an odd one, another one of the same container, or goes or comes."""
    if not isinstance(tree, (dict, list)) or not tree or draw.random() < 0.05:
        return draw.choice(ODD)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, other = draw.choice(keys), draw.choice(keys)
    if isinstance(tree[key], (dict, list)) and draw.random() < 0.85:
        tree[key] = _change(tree[key], draw)
        return tree
    match draw.randrange(6):
        case 0:
            del tree[key]
        case 1 if isinstance(tree, dict):
            tree[f"{key}_"] = tree[other]
        case 1:
            tree.insert(key, tree[other])
        case 2:
            tree[key] = tree[other]
        case _:
            tree[key] = draw.choice(ODD)
    return tree


def targets() -> dict[str, Target]:
    """Every format by name; imports memopt, so that the caller can instrument it first."""
    import torch

    sys.modules["transformers"] = None  # type: ignore[assignment]  # memopt's own reader of configs, not transformers'
    from memopt.integrations.checkpoints import checksums, restoring
    from memopt.integrations.checkpoints.tensor_file import read_header
    from memopt.planner import Plan, find_model, hardware, plan, validate
    from memopt.planner.devices import HardwareError, rates_of
    from memopt.planner.models import ModelError
    from memopt.planner.placement.csv_file import CsvError, read_csv
    from memopt.planner.plan_file import _digest
    from tests.planner.toy import CPU, transformer

    trace = transformer(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        plan(trace, int(trace.peak_bytes * 0.8), CPU).save(path)
        saved = path.read_bytes()
        rest = {"version": 1, "step": 1, "model": {}, "optimizer": None, "extra": 0, "random": restoring.random_state()}
        torch.save(rest, path := Path(folder, "rank.pt"))
        values = path.read_bytes()
        checksums.write(Path(folder), [checksums.of_file(path)])
        sums = (Path(folder) / checksums.NAME).read_bytes()
    table = resources.files("memopt.presets").joinpath("hardware/h100.json").read_bytes()
    gpt2 = b'{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 8}'
    llama = (
        b'{"model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,'
        b' "vocab_size": 16, "intermediate_size": 16, "num_key_value_heads": 1, "num_local_experts": 2,'
        b' "max_position_embeddings": 8}'
    )
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
    }

    def with_digest(values: Any) -> bytes:
        if isinstance(values, dict):
            values = {name: value for name, value in values.items() if name != "digest"}
            values["digest"] = _digest(values)
        return json.dumps(values).encode()

    def tensors(values: Any) -> bytes:
        text = json.dumps(values).encode()
        return len(text).to_bytes(8, "little") + text + bytes(25)

    def sums_of(path: Path) -> None:
        fault = checksums.fault(path.parent)
        if fault is not None:
            raise ValueError(fault)

    return {
        "plan": Target(
            lambda path: validate(trace, Plan.load(path), CPU), ValueError, "plan.json", (saved,), with_json=with_digest
        ),
        "hardware": Target(lambda path: rates_of(hardware(path), "bfloat16"), HardwareError, "device.json", (table,)),
        "instance": Target(
            read_csv, CsvError, "buffers.csv", (b"id,lower,upper,size\na,0,3,4\nb,2,5,8\n",), json_of=None
        ),
        "config": Target(lambda path: find_model(path, 1, 4), ModelError, "config.json", (gpt2, llama)),
        "tensors": Target(
            read_header,
            ValueError,
            "model.safetensors",
            (tensors(header),),
            lambda data: json.loads(data[8:-25]),
            tensors,
        ),
        "values": Target(
            lambda path: restoring._read_rest(path, 1), ValueError, "rank-00000.pt", (values,), json_of=None
        ),
        "checksums": Target(sums_of, ValueError, checksums.NAME, (sums,)),
    }


def main(name: str, seconds: int) -> None:
    """Fuzz one format, or ``all`` of them in turns, for about ``seconds``."""
    import atheris

    with atheris.instrument_imports(include=["memopt.planner", "memopt.integrations.checkpoints"]):
        known = targets()
    names = list(known) if name == "all" else [name]
    work = tempfile.TemporaryDirectory()
    corpus = Path(work.name, "corpus")
    corpus.mkdir()
    folders = {kind: Path(work.name, kind) for kind in names}
    for number, kind in enumerate(names):
        folders[kind].mkdir()
        for n, seed in enumerate(known[kind].seeds):
            (corpus / f"{number}-{n}").write_bytes(bytes([number]) + seed)

    def one(data: bytes) -> None:
        if data:
            kind, content = names[data[0] % len(names)], data[1:]
            try:
                known[kind].consume(content, folders[kind])
            except Exception:
                CRASHES.joinpath(f"{kind}-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)
                raise

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if data and draw.random() < 0.5:
            changed = known[names[data[0] % len(names)]].changed(data[1:], draw)
            if changed is not None and len(changed) < most:
                return data[:1] + changed
        return bytes(atheris.Mutate(data, most))

    options = [
        "-seed=1",
        "-timeout=60",
        f"-max_total_time={seconds}",
        f"-artifact_prefix={work.name}/",
        f"-max_len={LARGEST}",
        "-len_control=0",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
