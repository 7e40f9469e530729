"""Exports for PyTorch's memory viewer and for Perfetto, read back by what reads them."""

from __future__ import annotations

import json
import pickle
import pickletools
import re

import pytest
import torch
from torch import nn
from torch.cuda import _memory_viz

import memopt
from memopt.planner import Timeline
from memopt.report import Box, boxes_of, write_perfetto, write_snapshot
from memopt.report.snapshot import snapshot_of

BOXES = [
    Box(0, 9, 64, 32, "weight", "weights"),
    Box(1, 4, 0, 64, "first", "activations"),
    Box(4, 9, 0, 16, "second", "gradients"),
]
# What the viewer's JavaScript unpickler knows.
OPCODES = re.findall(
    r"\w+",
    """
    PROTO APPEND APPENDS LIST TUPLE NEWFALSE NEWTRUE NONE BINGET BININT BININT1 BININT2 EMPTY_DICT EMPTY_LIST FRAME
    LONG1 LONG_BINGET MARK MEMOIZE BINPUT LONG_BINPUT SETITEMS SETITEM DICT SHORT_BINUNICODE BINUNICODE STOP
    EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 BINFLOAT
    """,
)


def traced_boxes() -> list[Box]:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    return boxes_of(memopt.trace(model, (torch.ones(8, 32),)).storages)


@pytest.mark.parametrize("boxes", [BOXES, traced_boxes()], ids=["by hand", "traced"])
def test_pytorchs_reader_takes_the_snapshot(tmp_path, boxes):
    file = tmp_path / "snapshot.pickle"
    write_snapshot(file, boxes)
    data = pickle.loads(file.read_bytes())
    assert "segments: 1" in _memory_viz.segsum(data)
    allocations = re.findall(r"^\w+ = a\[", _memory_viz.trace(data), re.MULTILINE)  # a is the segment
    assert len(allocations) == len(boxes)
    assert ";weights:0:" in _memory_viz.segments(data, format_flamegraph="".join)
    assert "<script" in _memory_viz.trace_plot(data)
    assert {code.name for code, _, _ in pickletools.genops(file.read_bytes())} <= set(OPCODES)


@pytest.mark.parametrize("boxes", [BOXES, traced_boxes()], ids=["by hand", "traced"])
def test_replaying_the_history_gives_the_final_state_and_the_peak(boxes):
    snapshot = snapshot_of(boxes)
    live: dict[int, int] = {}
    peak = 0
    for event in snapshot["device_traces"][0]:
        if event["action"] == "alloc":
            start, stop = event["addr"], event["addr"] + event["size"]
            assert all(stop <= at or at + size <= start for at, size in live.items())
            live[start] = event["size"]
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"]) == event["size"]
        peak = max(peak, sum(live.values()))
    (segment,) = snapshot["segments"]
    at = segment["address"]
    for block in segment["blocks"]:
        assert block["address"] == at
        assert (live.get(at) == block["size"]) == (block["state"] == "active_allocated")
        at += block["size"]
    assert at == segment["address"] + segment["total_size"]
    assert segment["active_size"] == sum(live.values())
    moments = {box.start for box in boxes}
    assert peak == max(sum(b.bytes for b in boxes if b.start <= m < b.stop) for m in moments)


def test_the_viewers_unknown_category_is_there():
    # its code misspells the list that it would add the category to
    categories = [event["category"] for event in snapshot_of(BOXES)["device_traces"][0]]
    assert categories[0] == "unknown"
    assert set(categories[1:]) == {"weights", "activations", "gradients"}


def test_bad_boxes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="boxes is empty"):
        write_snapshot(tmp_path / "s.pickle", [])
    with pytest.raises(ValueError, match="'b' at offset 4 overlaps"):
        write_snapshot(tmp_path / "s.pickle", [Box(0, 2, 0, 8, "a", "weights"), Box(1, 2, 4, 8, "b", "weights")])
    with pytest.raises(OSError, match="missing"):
        write_snapshot(tmp_path / "missing" / "s.pickle", BOXES)
    assert list(tmp_path.iterdir()) == []


def test_perfetto_traces_hold_counters_slices_and_spans(tmp_path):
    model = nn.Linear(16, 16)
    with memopt.meter(model) as meter:
        model(torch.ones(4, 16)).sum().backward()
    file = tmp_path / "trace.json"
    plan = Timeline((0.0, 0.25), {"weights": (8, 8), "activations": (0, 24)})
    write_perfetto(file, runs={"plan": plan, "metered": meter}, maps={"arena": BOXES})
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {1: "plan", 2: "metered", 3: "arena"}
    counters = [e for e in events if e["ph"] == "C"]
    assert [(e["ts"], e["args"]) for e in counters if e["pid"] == 1] == [
        (0.0, {"weights": 8, "activations": 0}),
        (250000.0, {"weights": 8, "activations": 24}),
    ]
    assert max(sum(e["args"].values()) for e in counters if e["pid"] == 2) == meter.peak_bytes
    assert [e["args"] for e in counters if e["pid"] == 3][-1] == {"weights": 0, "activations": 0, "gradients": 0}
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == len(meter.timeline)
    assert all(e["dur"] >= 0 for e in slices)
    begun = {(e["pid"], e["id"]): e for e in events if e["ph"] == "b"}
    ended = {(e["pid"], e["id"]): e for e in events if e["ph"] == "e"}
    assert {(e["name"], e["ts"], ended[key]["ts"]) for key, e in begun.items()} == {
        (box.name, box.start, box.stop) for box in BOXES
    }


def test_an_empty_trace_is_refused(tmp_path):
    with pytest.raises(ValueError, match="runs and maps are empty"):
        write_perfetto(tmp_path / "t.json", runs={})
