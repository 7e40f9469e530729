"""Parity and speed of every kernel on a GPU: ``python -m benchmarks.gpu [--dry-run] [--out FOLDER] [--only TEXT]``.

Every case is checked against the plain torch implementation first, then timed against its floor (bytes moved at the
measured bandwidth of a copy, or operations at the measured rate of a matrix product) and against other implementations
where they are installed. One JSON and one Markdown file, named by date and device, are written. It needs no network
and stops starting new cases after ``--minutes``. ``--dry-run`` walks the same code on the CPU at tiny sizes.
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
    """One row: parity, seconds, share of the floor, extra memory, seconds of the peers."""
    case.check()
    row: dict[str, Any] = {"name": case.name, "parity": "ok"}
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        case.run()
        torch.cuda.synchronize()
        row["extra_bytes"] = torch.cuda.max_memory_allocated() - held
    row["seconds"] = seconds(place, case.run)
    floor = max(case.floor_bytes / bandwidth, case.floor_flops / flops)
    row["floor_seconds"], row["share_of_floor"] = floor, floor / row["seconds"]
    for name, make in case.peers.items():
        try:
            row.setdefault("peers", {})[name] = seconds(place, make())
        except Exception as error:  # a peer that fails on this device is worth knowing, not worth stopping for
            row.setdefault("peers", {})[name] = f"{type(error).__name__}: {str(error)[:100]}"
        gc.collect()
    return row


def compiled() -> list[dict[str, Any]]:
    """Registers and spills of the step's kernels on the targets; in a process of its own, as Triton wants."""
    import subprocess

    script = (
        "import dataclasses, json\nfrom memopt.kernels.gpu.targets import TARGETS, step_kinds, usages\n"
        "print(json.dumps([dataclasses.asdict(u) for t in TARGETS for u in usages(t, step_kinds())]))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return json.loads(run.stdout) if run.returncode == 0 else [{"error": run.stderr[-500:]}]


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        f"# Kernels on {report['device']}, {report['date']}",
        "",
        f"torch {report['torch']}; copy {report['copy_bytes_per_second'] / 1e9:.0f} GB/s read and written; "
        f"bf16 product {report['matmul_flops_per_second'] / 1e12:.1f} TFLOP/s.",
        "",
        "| case | parity | ms | share of floor | extra MiB | others, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["cases"]:
        peers = "; ".join(
            f"{name} {value * 1e3:.3f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.get("peers", {}).items()
        )
        extra = f"{row['extra_bytes'] / 2**20:.1f}" if "extra_bytes" in row else ""
        numbers = f"{row['seconds'] * 1e3:.3f} | {row['share_of_floor']:.2f}" if "seconds" in row else " | "
        lines.append(f"| {row['name']} | {row['parity']} | {numbers} | {extra} | {peers} |")
    return "\n".join([*lines, ""])


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
        "cases": [],
    }
    failed = False
    for name, make in collect(place):
        if options.only not in name:
            continue
        if time.monotonic() - started > 60 * options.minutes:
            report["cases"].append({"name": name, "parity": "not run: out of time"})
            continue
        try:
            row = measure(place, make(), bandwidth, flops)
        except Exception:  # the other cases still count; the exit status tells
            failed = True
            row = {"name": name, "parity": "FAILED", "error": traceback.format_exc()[-2000:]}
        report["cases"].append(row)
        print(f"{row['name']:55} {row['parity']:8} {row.get('seconds', float('nan')) * 1e3:10.3f} ms", flush=True)
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    if not options.dry_run:
        report["compiled"] = compiled()
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-{report['date']}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}"
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(markdown(report))
    print(f"written: {options.out / stem}.json and .md")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
