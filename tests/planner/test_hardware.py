"""The hardware table, files of the same form, and this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memopt.planner import Hardware, HardwareError, hardware, hardware_names

GIB = 2**30


def test_the_table_has_what_people_train_on() -> None:
    expected = {"a100-40", "a100-80", "cpu", "h100", "h200", "l40s", "mi300x", "rtx-3090", "rtx-4090", "rtx-5090", "t4"}
    assert expected <= set(hardware_names())


@pytest.mark.parametrize("name", hardware_names())
def test_every_entry_is_plausible(name: str) -> None:
    found = hardware(name)
    assert found.name == name
    assert 1e9 < found.sustained_memory < 1e13
    assert 1e10 < found.sustained_flops("float32") <= found.sustained_flops("bfloat16") < 1e16 or name == "t4"
    if found.kind != "cpu":
        assert 10 * GIB < found.memory_bytes < 300 * GIB
        assert 1e9 < found.sustained_to_host < 1e11
        assert found.host_bytes_per_device >= found.memory_bytes // 2 or found.devices_per_node > 1


def test_names_are_not_case_sensitive() -> None:
    assert hardware("H100") == hardware("h100")


def test_roofline() -> None:
    h100 = hardware("h100")
    assert h100.seconds(h100.sustained_flops("bfloat16"), 0, "bfloat16") == pytest.approx(1)
    assert h100.seconds(0, 2 * h100.sustained_memory, "bfloat16") == pytest.approx(2)


def test_an_unknown_dtype_runs_at_float32_rate() -> None:
    t4 = hardware("t4")
    assert t4.sustained_flops("bfloat16") == t4.sustained_flops("float32")


def test_a_shared_link_is_divided() -> None:
    a100 = hardware("a100-80")
    assert a100.link_shared_by == 2
    assert a100.sustained_to_host == a100.to_host_bytes_per_second * a100.link_efficiency / 2


def test_auto_is_this_machine() -> None:
    found = hardware("auto")
    assert found.memory_bytes > GIB // 4
    assert hardware(found) is found


def test_saved_files_come_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    hardware("rtx-4090").save(path)
    assert hardware(path) == hardware(str(path)) == hardware("rtx-4090")


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(HardwareError, match=r"unknown hardware 'b9000'.*h100.*rtx-4090"):
        hardware("b9000")
    with pytest.raises(HardwareError, match="memopt probe"):
        hardware("missing.json")


def changed(**values: Any) -> str:
    known = json.loads(json.dumps({f: getattr(hardware("h100"), f) for f in Hardware.__dataclass_fields__}))
    return json.dumps({key: value for key, value in {**known, **values}.items() if value != "drop"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", r"bad.json' is \[1\]; it must be an object"),
        (changed(memory_bytes="drop"), "lacks the field 'memory_bytes'"),
        (changed(colour=1), "unknown field 'colour'"),
        (changed(memory_bytes=-1), "memory_bytes must be a positive number, not -1"),
        (changed(memory_bytes=0), "memory_bytes must be a positive number, not 0"),
        (changed(memory_bytes=10**31), "memory_bytes must be a positive number"),
        (changed(memory_bytes=1.5), "memory_bytes is 1.5; it must be an integer"),
        (changed(memory_bytes=True), "memory_bytes is True; it must be an integer"),
        (changed(compute_efficiency=1.5), "at most 1"),
        (changed(flops_per_second={"bfloat16": 1e12}), "flops_per_second has no float32"),
        (changed(flops_per_second={"float32": 0}), "flops_per_second.float32 must be a positive number"),
        (changed(kind="abacus"), "kind must be"),
        (changed(overlaps="yes"), "overlaps is 'yes'; it must be true or false"),
        (changed(name=3), "name is 3; it must be text"),
        (changed(matches="H100"), "it must be a list"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(HardwareError, match=message):
        hardware(path)
