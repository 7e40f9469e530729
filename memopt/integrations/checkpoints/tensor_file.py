"""The safetensors format, written and read in parts: each rank its own rows of each tensor, in place.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, [start, stop) of its
bytes after the header), and the tensors' bytes without gaps. So a rank that holds some rows of a tensor knows where in
the file they belong, and no rank ever holds, copies or sends the others'.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # as the format's own reader
PIECE_BYTES = 64 * 2**20  # of one system call, during which no other thread of Python waits

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its bytes are [start, stop) of the file."""

    dtype: torch.dtype
    shape: Shape
    start: int
    stop: int


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, Shape]], notes: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file for these tensors, and where each of them lies.

    Args:
        tensors: dtype and whole shape by name.
        notes: text by name, kept in the header.

    Raises:
        ValueError: a dtype that the format has no name for.
    """
    for name, (dtype, _) in tensors.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}, which safetensors files cannot hold; they hold {', '.join(_BY_NAME)}")
    # Wide types first, as the format's own writer does, so that every tensor is aligned to its elements.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(notes)}
    spans, start = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        stop = start + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        spans[name], start = (start, stop), stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    before = 8 + len(text)
    entries = {name: Entry(*tensors[name], before + a, before + b) for name, (a, b) in spans.items()}
    return len(text).to_bytes(8, "little") + text, entries


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where each tensor of a file lies, and the header's notes.

    Raises:
        ValueError: not a whole safetensors file; the message says what is wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} is no safetensors file: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
            notes = header.pop("__metadata__", {})
            entries = {name: _entry(one, 8 + length) for name, one in header.items()}
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no safetensors file: its header cannot be read ({error})") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        expected = entry.dtype.itemsize * math.prod(entry.shape)
        if entry.start != end or entry.stop - entry.start != expected:
            raise ValueError(
                f"{path}: {name} lies at [{entry.start}, {entry.stop}), expected {expected} bytes at {end}"
            )
        end = entry.stop
    if end != size:
        raise ValueError(f"{path} has {size} bytes, its header describes {end}: it was cut short or added to")
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise ValueError(f"{path} is no safetensors file: its notes are not text")
    return entries, notes


def _entry(one: Mapping[str, object], before: int) -> Entry:
    shape, span = one["shape"], one["data_offsets"]
    if not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        raise ValueError("shape and data_offsets must be lists")
    if not all(type(n) is int and n >= 0 for n in (*shape, *span)):
        raise ValueError("shape and data_offsets must be whole numbers")
    return Entry(_BY_NAME[str(one["dtype"])], tuple(shape), before + span[0], before + span[1])


def runs(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """A part of a tensor as runs of neighbouring elements: (first in the whole, first in the part, how many).

    Args:
        shape: of the whole tensor.
        offsets: of the part's first element in each dimension.
        sizes: of the part in each dimension.
    """
    if 0 in sizes:
        return
    cut = max((d for d in range(len(shape)) if sizes[d] != shape[d]), default=0)  # all dimensions after it are whole
    count = math.prod(sizes[cut:])
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    for number in range(math.prod(sizes[:cut])):
        left, first = number, 0
        for d in reversed(range(cut)):
            left, index = divmod(left, sizes[d])
            first += (offsets[d] + index) * strides[d]
        if shape:
            first += offsets[cut] * strides[cut]
        yield first, number * count, count


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, not copied."""
    return memoryview(cast(Any, tensor.detach().reshape(-1).view(torch.uint8).numpy()))


def write_part(file: int, entry: Entry, part: Tensor, offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    """Write the part of a tensor that begins at ``offsets``; ``file`` is a descriptor open for writing.

    Returns:
        The pieces written: first and last byte (exclusive) in the file, and the CRC-32 of what is between.
    """
    data, size = _bytes_of(part.contiguous()), entry.dtype.itemsize
    pieces = []
    for whole, own, count in runs(entry.shape, offsets, part.shape):
        at, end = entry.start + (whole - own) * size, (own + count) * size  # a byte of the part lies at + its number
        for begin in range(own * size, end, PIECE_BYTES):
            stop = min(end, begin + PIECE_BYTES)
            pieces.append((at + begin, at + stop, zlib.crc32(data[begin:stop])))
            while begin < stop:
                begin += os.pwrite(file, data[begin:stop], at + begin)
    return pieces


def read_part(file: int, entry: Entry, part: Tensor, offsets: Sequence[int]) -> None:
    """Fill ``part``, a contiguous CPU tensor, with the part of the stored tensor that begins at ``offsets``.

    Raises:
        ValueError: the file ends before the part does.
    """
    data, size = _bytes_of(part), entry.dtype.itemsize
    for whole, own, count in runs(entry.shape, offsets, part.shape):
        at, begin, end = entry.start + whole * size, own * size, (own + count) * size
        while begin < end:
            got = os.preadv(file, [data[begin : min(end, begin + PIECE_BYTES)]], at)
            if got == 0:
                raise ValueError(f"the file ends at byte {at}, within a tensor of shape {entry.shape}")
            at, begin = at + got, begin + got
