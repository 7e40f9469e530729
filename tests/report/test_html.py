"""The HTML page: what it contains, what it refuses, and that a browser opens it without a complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from memopt.planner import Category, Storage, Timeline
from memopt.report import Box, boxes_of, write_html
from memopt.report.series import LONGEST, as_series

TIMELINE = Timeline((0.0, 0.5, 1.0), {"weights": (8, 8, 8), "activations": (0, 2048, 16)})
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r"^const page = (.*);$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return json.loads(found.group(1))


def test_runs_of_every_kind_are_drawn(tmp_path):
    model = nn.Linear(16, 16)
    with memopt.meter(model) as meter:
        model(torch.ones(4, 16)).sum().backward()
    page = tmp_path / "page.html"
    write_html(
        page, title="t", runs={"plan": TIMELINE, "meter": meter, "samples": meter.timeline, "nothing": None, "no": []}
    )
    plan, metered, samples, nothing, no = data_of(page)["runs"]
    assert plan["total"] == [8, 2056, 24]
    assert plan["peak"] == {"weights": 8, "activations": 2048}
    assert metered["total"] == samples["total"] == [sample.live_bytes for sample in meter.timeline]
    assert max(metered["total"]) == meter.peak_bytes
    assert "addmm" in " ".join(metered["labels"])
    assert nothing["total"] == no["total"] == []


def test_the_page_is_self_contained_and_escaped(tmp_path):
    page = tmp_path / "page.html"
    box = Box(0, 2, 0, 8, "</script><b>", "weights")
    write_html(page, title="<i> & co", runs={"</script>": TIMELINE}, maps={"@TITLE@": [box]})
    text = page.read_text(encoding="utf-8")
    assert text.count("</script>") == text.count("<script>") == 2
    assert "&lt;i&gt; &amp; co" in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?(http|//|\.)", text)
    assert data_of(page)["maps"] == [{"name": "@TITLE@", "boxes": [[0, 2, 0, 8, "</script><b>", "weights"]]}]
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_long_runs_are_thinned_and_keep_their_peak():
    count = 3 * LONGEST + 1
    values = [k % 7 for k in range(count)]
    values[5000] = 99
    series = as_series("long", Timeline(tuple(map(float, range(count))), {"weights": tuple(values)}))
    assert len(series.index) == LONGEST
    assert series.peak == {"weights": 99}
    assert series.index[series.total.index(99)] == 5000
    assert list(series.index) == sorted(set(series.index))


def test_boxes_are_placed_or_take_the_offsets_given():
    storages = [
        Storage(7, 8, Category.WEIGHTS, 0, 9, None, "w"),
        Storage(8, 0, Category.WEIGHTS, 0, 9, None, "empty"),
        Storage(9, 4, Category.TEMPORARIES, 2, 3, 1, "t"),
        Storage(10, 4, Category.TEMPORARIES, 5, 5, 1, "never alive"),
    ]
    assert boxes_of(storages, [4, 0, 0, 0]) == [Box(0, 9, 4, 8, "w", "weights"), Box(2, 3, 0, 4, "t", "temporaries")]
    assert {(box.name, box.offset) for box in boxes_of(storages)} == {("w", 0), ("t", 8)}
    with pytest.raises(ValueError, match="2 offsets for 4 storages"):
        boxes_of(storages, [0, 0])


@pytest.mark.parametrize(
    ("runs", "error", "says"),
    [
        ({}, ValueError, "runs is empty"),
        ({"a": 3}, TypeError, "run 'a' is int"),
        ({"a": "text"}, TypeError, "run 'a' is str"),
        ({"a": Timeline((0.0,), {"weights": (1, 2)})}, ValueError, "run 'a': 2 values of weights for 1 moments"),
    ],
)
def test_bad_runs_are_refused_and_nothing_is_written(tmp_path, runs, error, says):
    with pytest.raises(error, match=says):
        write_html(tmp_path / "page.html", title="t", runs=runs)
    assert list(tmp_path.iterdir()) == []


def test_without_plotly_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r"memopt\[report\]"):
        write_html(tmp_path / "page.html", title="t", runs={"a": TIMELINE})


CLICKS = """<script>{
console.log("panels " + document.querySelectorAll(".panel svg.main-svg").length);
document.querySelector("input[value=seconds]").click();
const all = document.querySelectorAll(".panel"), frame = all[2].getBoundingClientRect();
console.log("axis " + all[0].layout.xaxis.title.text + " " + all[0].data[0].x);
const middle = {clientX: frame.left + frame.width / 2, clientY: frame.top + frame.height / 2};
all[2].dispatchEvent(new MouseEvent("mousemove", middle));
console.log("fact " + document.querySelector("#facts dd").textContent + " " + all[0].layout.shapes[0].y0);
console.log("tip " + document.querySelector(".tip").textContent);
}</script></body>"""


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium or Chrome on this machine")
def test_a_headless_browser_draws_it_without_a_console_message(tmp_path):
    page = tmp_path / "page.html"
    runs, maps = {"before": TIMELINE, "after": TIMELINE}, {"m": [Box(0, 4, 0, 64, "w", "weights")]}
    write_html(page, title="t", runs=runs, maps=maps, facts={"verdict": "fits"}, limit_bytes=1024)
    assert _console(page) == []
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", CLICKS), encoding="utf-8")
    drawn, axis, fact, tip = _console(page)
    assert int(drawn.split()[1]) >= 3
    assert axis == "axis seconds 0,0.5,1"
    assert fact == "fact fits 1"
    assert tip == "tip w (weights), 64 B at 0, operations 0 to 4"


def _console(page: Path) -> list[str]:
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=8000"]
    folder = f"--user-data-dir={page.parent / 'profile'}"
    run = subprocess.run(
        [browser, *options, folder, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    return re.findall(r'CONSOLE[^\]]*\] "(.*)", source', run.stderr)
