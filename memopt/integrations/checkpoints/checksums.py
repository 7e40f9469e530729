"""The checksums of a checkpoint: ``checksums.json`` holds the CRC-32 of every piece of every file.

Each rank computes those of what it wrote, while it writes; the coordinator gathers them. ``torch.load`` does not check
the sums inside its own files, and safetensors files have none: without these, a flipped bit would go into training.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

NAME = "checksums.json"
READ_BYTES = 16 * 2**20


class Piece(NamedTuple):
    """Bytes [start, stop) of a file of the checkpoint, and their CRC-32."""

    file: str
    start: int
    stop: int
    crc: int


def write(folder: Path, pieces: Iterable[Piece]) -> None:
    """Write the sums beside the files, and wait until they have reached the disk."""
    with (folder / NAME).open("x", encoding="utf-8") as file:
        json.dump(sorted(pieces), file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())


def of_file(path: Path) -> Piece:
    """The sum of a small file as it is on the disk."""
    content = path.read_bytes()
    return Piece(path.name, 0, len(content), zlib.crc32(content))


def fault(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or None: every ``shares``-th piece is read, from the ``share``-th on."""
    try:
        pieces = _read(folder / NAME)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"{folder / NAME} cannot be read: {error}"
    try:
        _check_whole(folder, pieces)
        for piece in pieces[share::shares]:
            if _crc(folder / piece.file, piece.start, piece.stop) != piece.crc:
                return f"{folder / piece.file} is damaged between bytes {piece.start} and {piece.stop}"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _read(path: Path) -> list[Piece]:
    found = [Piece(*entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    for piece in found:
        if type(piece.file) is not str or any(type(n) is not int for n in piece[1:]):
            raise ValueError(f"{piece!r} is no piece of a file")
    return sorted(found)


def _check_whole(folder: Path, pieces: Sequence[Piece]) -> None:
    """Every byte of every file belongs to exactly one piece, as far as sizes tell."""
    ends: dict[str, int] = {}
    for piece in pieces:
        if piece.start != ends.get(piece.file, 0) or piece.stop < piece.start:
            raise ValueError(f"{folder / NAME} leaves a gap in {piece.file} at byte {ends.get(piece.file, 0)}")
        ends[piece.file] = piece.stop
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != NAME}
    for name in sorted(sizes.keys() | ends.keys()):
        if name not in sizes or name not in ends or sizes[name] != ends[name]:
            raise ValueError(
                f"{folder / name} has {sizes.get(name, 'no')} bytes, expected {ends.get(name, 'no such file')}"
            )


def _crc(path: Path, start: int, stop: int) -> int:
    crc = 0
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            content = file.read(min(READ_BYTES, stop - start))
            if not content:
                raise ValueError(f"{path} ends at byte {start}")
            crc, start = zlib.crc32(content, crc), start + len(content)
    return crc
