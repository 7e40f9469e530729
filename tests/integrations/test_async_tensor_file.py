"""The safetensors files, against the format's own library."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from memopt.integrations.checkpoints.tensor_file import DTYPES, lay_out, read_header, read_part, runs, write_part

SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (4, 1, 3, 2)]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            data = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator)
            made[f"{dtype}{list(shape)}"] = data.to(dtype)
    return made


def written(path: Path, values: dict[str, torch.Tensor]) -> None:
    header, entries = lay_out({name: (v.dtype, tuple(v.shape)) for name, v in values.items()}, {"format": "pt"})
    path.write_bytes(header)
    descriptor = os.open(path, os.O_WRONLY)
    for name, value in values.items():
        write_part(descriptor, entries[name], value, (0,) * value.dim())
    os.close(descriptor)


def test_its_library_reads_what_we_write(tmp_path: Path) -> None:
    values = tensors()
    written(tmp_path / "ours", values)
    read = load_file(tmp_path / "ours")
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name].dtype == value.dtype, name
        assert torch.equal(read[name].view(value.shape), value), name


def test_we_read_what_its_library_writes(tmp_path: Path) -> None:
    values = tensors()
    save_file(values, tmp_path / "theirs", {"note": "text"})
    entries, notes = read_header(tmp_path / "theirs")
    assert notes == {"note": "text"}
    descriptor = os.open(tmp_path / "theirs", os.O_RDONLY)
    for name, value in values.items():
        got = torch.empty_like(value)
        read_part(descriptor, entries[name], got, (0,) * value.dim())
        assert torch.equal(got, value), name
    os.close(descriptor)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_are_those_of_the_whole(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    low = [data.draw(st.integers(0, size)) for size in shape]
    sizes = [data.draw(st.integers(0, size - start)) for size, start in zip(shape, low, strict=True)]
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    part = whole
    for d, (start, size) in enumerate(zip(low, sizes, strict=True)):
        part = part.narrow(d, start, size)
    found = [(own, whole.flatten()[first : first + count]) for first, own, count in runs(shape, low, sizes)]
    joined = torch.cat([values for _, values in found]) if found else torch.empty(0, dtype=whole.dtype)
    assert torch.equal(joined, part.flatten())
    assert [own for own, _ in found] == [sum(len(v) for _, v in found[:i]) for i in range(len(found))]


def header_of(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def one(**changes: object) -> bytes:
    return header_of(json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        header_of(b"{}", 2**63),
        header_of(b"[1, 2]"),
        header_of(b"{"),
        header_of(b"\xff\xfe"),
        header_of(b'{"x":' * 5000),
        one(dtype="F33") + b"8 bytes!",
        one(shape=[-2]) + b"8 bytes!",
        one(shape=[True, 2]) + b"8 bytes!",
        one(shape=[3]) + b"8 bytes!",
        one(data_offsets=[4, 12]) + b"8 bytes!",
        one(data_offsets=[0]) + b"8 bytes!",
        one() + b"7 bytes",
        one() + b"9  bytes!",
        header_of(b'{"__metadata__":{"a":1}}'),
    ],
    ids=lambda content: repr(content[8:60]),
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file"):
        read_header(tmp_path / "file")


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch.complex64, which safetensors"):
        lay_out({"x": (torch.complex64, (2,))}, {})
