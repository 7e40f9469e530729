"""Placement problems as CSV files."""

from __future__ import annotations

import pytest

from memopt.planner import Buffer
from memopt.planner.placement import CsvError, read_csv, write_csv
from tests.planner.placement_cases import planted, training_step

GOOD = "id,lower,upper,size\na,0,3,4\nb,3,9,4\nc,0,9,4\n"


def test_reads_columns_in_any_order_and_without_ids(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text(GOOD)
    assert read_csv(file) == [Buffer(0, 3, 4, "a"), Buffer(3, 9, 4, "b"), Buffer(0, 9, 4, "c")]
    file.write_text("\ufeffSize, upper ,lower,note\r\n4,3,0,x\r\n\r\n5,9,3,y\r\n", encoding="utf-8")
    assert read_csv(file) == [Buffer(0, 3, 4, "0"), Buffer(3, 9, 5, "1")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: no column lower, upper, size"),
        ("id,lower,size\n", "line 1: no column upper"),
        ("id,lower,lower,upper,size\n", "line 1: column lower appears twice"),
        (GOOD + "d,1,2\n", "line 5: 3 fields, expected 4"),
        (GOOD + "d,1,2,3,4\n", "line 5: 5 fields, expected 4"),
        (GOOD + "d,-1,2,3\n", "line 5: lower is -1, expected 0 or more"),
        (GOOD + "d,1,2,-3\n", "line 5: size is -3, expected 0 or more"),
        (GOOD + "d,2,2,3\n", "line 5: lower 2 is not below upper 2"),
        (GOOD + "d,5,2,3\n", "line 5: lower 5 is not below upper 2"),
        (GOOD + "a,1,2,3\n", "line 5: id 'a' is already used in line 2"),
        (GOOD + "d,1.5,2,3\n", "line 5: lower is '1.5', expected an integer"),
        (GOOD + "d,1,2,1_000\n", "line 5: size is '1_000'"),
        (GOOD + "d,1,2,--3\n", "line 5: size is '--3'"),
        (GOOD + "d,1,2,\n", "line 5: size is ''"),
        (GOOD + "d,1,2,1" + 20 * "0" + "\n", "at most 18 digits"),
        (GOOD + 'd,1,2,"3', "line 5: unexpected end of data"),
    ],
)
def test_doubtful_files_are_refused_with_the_line(tmp_path, text, says):
    file = tmp_path / "p.csv"
    file.write_text(text)
    with pytest.raises(CsvError, match=says) as caught:
        read_csv(file)
    assert str(caught.value).startswith(str(file))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(CsvError, match="cannot be read"):
        read_csv(tmp_path / "missing.csv")
    with pytest.raises(CsvError, match="cannot be read"):
        read_csv(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CsvError, match="not a text file"):
        read_csv(tmp_path / "binary.csv")


def test_a_problem_survives_writing_and_reading(tmp_path):
    buffers = training_step(3) + planted(0, 20, 999)
    write_csv(tmp_path / "p.csv", buffers, [0] * len(buffers))
    assert [(b.start, b.stop, b.size) for b in read_csv(tmp_path / "p.csv")] == [
        (b.start, b.stop, b.size) for b in buffers
    ]
    assert (tmp_path / "p.csv").read_text().startswith("id,lower,upper,size,offset\n0,0,60,")
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(CsvError, match="cannot be written"):
        write_csv(tmp_path / "missing" / "p.csv", [], [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(CsvError, match="cannot be written"):
        write_csv(tmp_path / "folder", [], [])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
