"""Checkpoints that were damaged, cut or made up: refused by name, without running code, and nothing is changed.

A flipped bit or a lost byte is found by the checksums. Whoever makes a checkpoint up also writes its checksums; so what
is made up here has checksums that fit, and is loaded with and without looking at them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memopt.integrations.checkpoints import Checkpoints, checksums
from tests.integrations.checkpointed import assert_same, made, train, values

Damage = Callable[[Path], object]
RANK, MODEL, STATES, SUMS = "rank-00000.pt", "model.safetensors", "optimizer.safetensors", checksums.NAME


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("run",)


def refused(folder: Path, damage: Damage, message: str, verify: bool = True) -> None:
    """Damage a checkpoint between two steps: loading it fails with the message, and all stays as it was."""
    model, optimizer = made()
    train(model, optimizer, range(1))
    with Checkpoints(folder) as checkpoints:
        damage(checkpoints.save(1, model, optimizer).wait())
        train(model, optimizer, range(1, 2))
        before, drawn, calls = values(model, optimizer), torch.get_rng_state(), model.calls
        with pytest.raises(ValueError, match=f"step-000000001.*{message}"):
            checkpoints.load(model, optimizer, verify=verify)
    assert_same(values(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.calls == calls


def flipped(name: str, byte: int | None = None) -> Damage:
    def flip(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2 if byte is None else byte] ^= 1
        (path / name).write_bytes(data)

    return flip


def cut(name: str) -> Damage:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 10)


def listed(edit: Callable[[list[Any]], list[Any]]) -> Damage:
    """The checksums are listed otherwise; the files are as they were."""
    return lambda path: (path / SUMS).write_text(json.dumps(edit(json.loads((path / SUMS).read_text()))))


DAMAGED: dict[str, tuple[Damage, str]] = {
    "a bit of a weight": (flipped(MODEL), "is damaged between bytes"),
    "a bit of a state": (flipped(STATES), "is damaged between bytes"),
    "a bit of a header": (flipped(MODEL, 20), "is damaged between bytes 0"),
    "a bit of the plain values": (flipped(RANK), "is damaged between bytes"),
    "a bit of the checksums": (flipped(SUMS), ""),
    "weights cut": (cut(MODEL), "expected"),
    "plain values cut": (cut(RANK), "expected"),
    "no weights": (lambda path: (path / MODEL).write_bytes(b""), "has 0 bytes, expected"),
    "states gone": (lambda path: (path / STATES).unlink(), "has no bytes, expected"),
    "a file more": (lambda path: (path / "rank-00001.pt").write_bytes(b"x"), "expected no such file"),
    "no checksums": (lambda path: (path / SUMS).unlink(), "cannot be read"),
    "nothing listed": (listed(lambda pieces: []), "expected no such file"),
    "a piece not listed": (listed(lambda pieces: [p for p in pieces if p[:2] != [MODEL, 0]]), "leaves a gap"),
    "nonsense listed": (listed(lambda pieces: [["a", 0, 1, "b"]]), "is no piece of a file"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(tmp_path: Path, how: str) -> None:
    refused(tmp_path, *DAMAGED[how])


def rank_of(value: Any) -> Damage:
    return lambda path: torch.save(value, path / RANK)


def plain(**changed: Any) -> Damage:
    """The plain values with some of them others, or, for ``...``, missing."""

    def change(path: Path) -> None:
        rest = {**torch.load(path / RANK, weights_only=True), **changed}
        torch.save({name: value for name, value in rest.items() if value is not ...}, path / RANK)

    return change


def header(name: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    """The header of a tensor file is edited; the tensors' bytes are as they were."""

    def change(path: Path) -> None:
        data = (path / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        edit(found := json.loads(data[8 : 8 + length]))
        text = json.dumps(found).encode()
        (path / name).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return change


MADE_UP: dict[str, tuple[Damage, str]] = {
    "code": (rank_of({"version": 1, "extra": Malicious()}), "Weights only load failed"),
    "no pickle": (lambda path: (path / RANK).write_bytes(b"\x80\x04."), "is damaged"),
    "a list": (rank_of([1]), "of version None"),
    "a tensor": (rank_of(torch.ones(3)), "of version None"),
    "of a later version": (plain(version=2), "of version 2; this memopt reads versions 1 to 1"),
    "of version 0": (plain(version=0), "of version 0"),
    "version no number": (plain(version=True), "of version True"),
    "no step": (plain(step=...), "step in it: missing"),
    "step as text": (plain(step="1"), "step in it"),
    "no random states": (plain(random={}), "random state cannot be used"),
    "short random state": (plain(random={"cpu": torch.zeros(3, dtype=torch.uint8)}), "random state cannot be used"),
    "no model": (plain(model=None), "model in it"),
    "no place for weights": (plain(model={}), "has no place"),
    "no optimizer": (plain(optimizer=None), "was saved without an optimizer"),
    "tied to nothing": (header(MODEL, lambda h: h["__metadata__"].update(tied="[1]")), "note on tied weights"),
    "a weight renamed": (header(MODEL, lambda h: h.update(other=h.pop("norm.bias"))), "no weight 'norm.bias'"),
    "a state renamed": (header(STATES, lambda h: h.update(other=h.pop("state/0/step"))), "holds 'other'"),
    "weights cut": (cut(MODEL), "it was cut short"),
}


@pytest.mark.parametrize("how", MADE_UP)
def test_a_made_up_checkpoint_is_refused_and_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, message = MADE_UP[how]

    def make_up(path: Path) -> None:
        damage(path)
        (path / SUMS).unlink()
        checksums.write(path, [checksums.of_file(file) for file in path.iterdir()])

    for verify in (True, False):
        refused(tmp_path / f"{verify}", make_up, message, verify)
    assert not (tmp_path / "run").exists()
