"""Parity and speed of every kernel on a GPU: ``python -m benchmarks.gpu [--dry-run] [--out FOLDER] [--only TEXT]``.

First every kernel is checked against its plain torch implementation, then each is timed against its floor (bytes moved
at the measured bandwidth of a copy, or operations at the measured rate of a matrix product) and against other
implementations where they are installed; the figures that matter most come first. One JSON and one Markdown file, named
by date and device, are written. It needs no network; after ``--minutes`` it begins nothing more and names what it left
out. ``--dry-run`` walks the same code on the CPU at tiny sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import Case, Place, collect


def seconds(place: Place, run: Callable[[], object]) -> float:
    """The median time of a call after warming up, on the device's own clock."""
    rounds = 2 if place.tiny else 12
    for _ in range(1 if place.tiny else 3):
        run()
    if place.device.type != "cuda":
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, stop in marks:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks) / 1e3


def rates(place: Place) -> tuple[float, float]:
    """Bytes per second of a copy (read and written) and operations per second of a bfloat16 product."""
    x = torch.empty(place.size(1 << 29, 1 << 16), dtype=torch.uint8, device=place.device)
    y = torch.empty_like(x)
    copied = 2 * x.nbytes / seconds(place, lambda: y.copy_(x))
    n = place.size(8192, 64)
    a = torch.randn(n, n, device=place.device, dtype=torch.bfloat16)
    return copied, 2 * n**3 / seconds(place, lambda: a @ a)


def measure(place: Place, case: Case, bandwidth: float, flops: float) -> dict[str, Any]:
    """One row: seconds, share of the floor, memory beyond the results; the same of the peers."""
    timed = case.prepare()
    row = memory_and_seconds(place, timed.run)
    floor = max(timed.floor_bytes / bandwidth, timed.floor_flops / flops)
    row |= {"floor_seconds": floor, "share_of_floor": floor / row["seconds"], "peers": {}}
    for name, make in timed.peers.items():
        try:
            row["peers"][name] = memory_and_seconds(place, make())
        except Exception as error:  # a peer that fails on this device is worth knowing, not worth stopping for
            row["peers"][name] = {"error": f"{type(error).__name__}: {str(error)[:100]}"}
        clear(place)
    return row


def memory_and_seconds(place: Place, run: Callable[[], object]) -> dict[str, Any]:
    """The median time of a call, and the most memory it needs beyond its inputs and results."""
    run()  # what it leaves, such as gradients, is there from now on
    row: dict[str, Any] = {}
    if place.device.type == "cuda":
        clear(place)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        row["extra_bytes"] = torch.cuda.max_memory_allocated() - held
    row["seconds"] = seconds(place, run)
    return row


def clear(place: Place) -> None:
    """Gives the GPU's memory back."""
    if place.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the kernels are to reach, what was measured, and whether it is met; nothing where a case did not run."""
    timed = {row["name"]: row for row in rows if "seconds" in row}
    found: list[dict[str, Any]] = []

    def add(aim: str, measured: float, most: float) -> None:
        found.append({"aim": aim, "measured": measured, "at most": most, "met": measured <= most})

    large = timed.get("AdamW 8bit states, large, bfloat16")
    if large:
        aim = "8-bit AdamW of 2**30 bf16 parameters: time over the time of a copy of the same bytes"
        add(aim, 1 / large["share_of_floor"], 1 / 0.85)
    for dtype in ("float32", "bfloat16"):
        small = timed.get(f"AdamW 8bit states, 124M, {dtype}")
        if small and "seconds" in small["peers"].get("torch fused", {}):
            ratio = small["seconds"] / small["peers"]["torch fused"]["seconds"]
            add(f"8-bit AdamW of a 124M model, {dtype}: time over torch fused", ratio, 1.0)
    losses = [row for name, row in timed.items() if name.startswith("vocabulary loss 8192 x 256000")]
    peer = next((row["peers"]["torch compiled"] for row in losses if "torch compiled" in row["peers"]), {})
    for row in losses:
        if "seconds" in peer:
            add(f"{row['name']}: time over torch compiled", row["seconds"] / peer["seconds"], 1.0)
        if "extra_bytes" in row:
            add(f"{row['name']}: megabytes beyond the gradients", row["extra_bytes"] / 1e6, 100.0)
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        f"# Kernels on {report['device']}, {report['date']}",
        "",
        f"torch {report['torch']}; copy {report['copy_bytes_per_second'] / 1e9:.0f} GB/s read and written; "
        f"bf16 product {report['matmul_flops_per_second'] / 1e12:.1f} TFLOP/s. {report['minutes']:.1f} minutes.",
        "",
    ]
    if report["not_run"]:
        lines += ["Not run for lack of time: " + ", ".join(report["not_run"]) + ".", ""]
    if report["aims"]:
        lines += ["| aim | measured | at most | met |", "|---|---|---|---|"]
        for aim in report["aims"]:
            lines.append(f"| {aim['aim']} | {aim['measured']:.2f} | {aim['at most']:.2f} | {aim['met']} |")
        lines.append("")
    lines += [
        "| case | parity | ms | share of floor | extra MiB | others: ms, extra MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["cases"]:
        peers = "; ".join(f"{name} {_cost(value)}" for name, value in row.get("peers", {}).items())
        numbers = f"{row['seconds'] * 1e3:.3f} | {row['share_of_floor']:.2f}" if "seconds" in row else " | "
        lines.append(f"| {row['name']} | {row['parity']} | {numbers} | {_extra(row)} | {peers} |")
    return "\n".join([*lines, ""])


def _cost(row: dict[str, Any]) -> str:
    return row.get("error") or f"{row['seconds'] * 1e3:.3f}{', ' * ('extra_bytes' in row)}{_extra(row)}"


def _extra(row: dict[str, Any]) -> str:
    return f"{row['extra_bytes'] / 2**20:.1f}" if "extra_bytes" in row else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no case after that")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU found; use --dry-run to walk through on the CPU", file=sys.stderr)
        return 1
    place = Place(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run)
    started = time.monotonic()
    bandwidth, flops = rates(place)
    device = "dry-run" if options.dry_run else torch.cuda.get_device_name()
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": device,
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "matmul_flops_per_second": flops,
    }
    cases = [case for case in collect(place) if options.only in case.name]
    rows = walk(place, cases, bandwidth, flops, started + 60 * options.minutes)
    report |= {
        "minutes": (time.monotonic() - started) / 60,
        "not_run": [row["name"] for row in rows if row["parity"] == "not run" or not {"seconds", "error"} & set(row)],
        "aims": aims(rows),
        "cases": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-{report['date']}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}"
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(markdown(report))
    print(f"written: {options.out / stem}.json and .md")
    if report["not_run"]:
        print("not run for lack of time: " + ", ".join(report["not_run"]))
    return int(any("error" in row for row in rows))


def walk(place: Place, cases: list[Case], bandwidth: float, flops: float, deadline: float) -> list[dict[str, Any]]:
    """All parity checks, then all times; nothing begins after the deadline, a third of which is for the checks."""
    rows: list[dict[str, Any]] = []
    checks_end = time.monotonic() + (deadline - time.monotonic()) / 3
    for case in cases:
        row: dict[str, Any] = {"name": case.name, "parity": "not run"}
        if time.monotonic() < checks_end:
            row |= attempt(lambda case=case: case.check() or {"parity": "ok"}, parity="FAILED")
        print(f"{case.name:60} parity {row['parity']}", flush=True)
        rows.append(row)
    clear(place)
    for case, row in zip(cases, rows, strict=True):
        if time.monotonic() < deadline and "error" not in row:
            row |= attempt(lambda case=case: measure(place, case, bandwidth, flops))
            print(f"{case.name:60} {row.get('seconds', float('nan')) * 1e3:10.3f} ms", flush=True)
            clear(place)
    return rows


def attempt(run: Callable[[], dict[str, Any]], **failed: str) -> dict[str, Any]:
    """What ``run`` returns, or the error it ends with: the other cases still count, and the exit status tells."""
    try:
        return run()
    except Exception:
        return {**failed, "error": traceback.format_exc()[-2000:]}


if __name__ == "__main__":
    sys.exit(main())
