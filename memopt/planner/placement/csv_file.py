"""Placement problems and results as CSV: ``id,lower,upper,size`` in, the same with ``offset`` out.

The format is minimalloc's: half-open lifetimes, one buffer a line, a header naming the columns in any order. ``id``
may be missing; other columns are left alone. Everything doubtful is refused with its line number.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from memopt.files import write_whole
from memopt.planner.placement.problem import Buffer

_NUMBERS = ("lower", "upper", "size")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


class CsvError(ValueError):
    """A CSV file that does not describe a placement problem; the message starts with file and line."""


def read_csv(path: str | os.PathLike[str]) -> list[Buffer]:
    """The buffers of a CSV file, named by their ``id``.

    Raises:
        CsvError: no such file, not text, a missing or repeated column, a line with the wrong number of fields, a
            number that is none, a negative lower or size, lower not below upper, or an id used twice.
    """
    where = Path(path)
    try:
        text = where.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CsvError(f"{where}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise CsvError(f"{where}: not a text file in UTF-8") from None
    rows = csv.reader(io.StringIO(text), strict=True)
    try:
        return _buffers(where, ((rows.line_num, row) for row in rows))
    except csv.Error as error:
        raise CsvError(f"{where}, line {rows.line_num}: {error}") from None


def _buffers(where: Path, rows: Iterator[tuple[int, list[str]]]) -> list[Buffer]:
    header = [name.strip().lower() for name in next(rows, (1, []))[1]]
    missing = [name for name in _NUMBERS if name not in header]
    if missing:
        raise CsvError(f"{where}, line 1: no column {', '.join(missing)}; expected a header id,lower,upper,size")
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise CsvError(f"{where}, line 1: column {', '.join(doubled)} appears twice")
    buffers: list[Buffer] = []
    seen: dict[str, int] = {}
    for line, row in rows:
        at = f"{where}, line {line}"
        if not row:
            continue
        if len(row) != len(header):
            raise CsvError(f"{at}: {len(row)} fields, expected {len(header)}")
        fields = dict(zip(header, row, strict=True))
        lower, upper, size = (_number(at, name, fields[name]) for name in _NUMBERS)
        name = fields.get("id", str(len(buffers))).strip()
        if name in seen:
            raise CsvError(f"{at}: id {name!r} is already used in line {seen[name]}")
        seen[name] = line
        if lower >= upper:
            raise CsvError(f"{at}: lower {lower} is not below upper {upper}")
        buffers.append(Buffer(lower, upper, size, name))
    return buffers


def _number(at: str, column: str, text: str) -> int:
    text = text.strip()
    if not _INTEGER.fullmatch(text):  # int() would also take "1_000" and other scripts' digits
        raise CsvError(f"{at}: {column} is {text[:40]!r}, expected an integer of at most 18 digits")
    value = int(text)
    if value < 0:
        raise CsvError(f"{at}: {column} is {value}, expected 0 or more")
    return value


def write_csv(path: str | os.PathLike[str], buffers: Sequence[Buffer], offsets: Sequence[int]) -> None:
    """Writes ``id,lower,upper,size,offset``, whole or not at all; unnamed buffers are numbered.

    Raises:
        CsvError: the file cannot be written.
    """
    where = Path(path)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", *_NUMBERS, "offset"])
    for i, (buffer, offset) in enumerate(zip(buffers, offsets, strict=True)):
        writer.writerow([buffer.name or i, buffer.start, buffer.stop, buffer.size, offset])
    try:
        write_whole(where, out.getvalue())
    except OSError as error:
        raise CsvError(f"{where}: cannot be written ({error.strerror or error})") from None
