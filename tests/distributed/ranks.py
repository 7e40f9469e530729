"""Run a function on several gloo ranks of this machine and hand back what each rank returned.

``run_ranks(work, 2, *args)`` calls ``work(rank, *args)`` in two processes that share a process group. The processes
stay alive for the whole test session (importing torch costs seconds), so ``work`` must be a function of a module,
not a lambda or a closure, and must leave nothing behind that another test would see.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_SECONDS = 60  # a rank that waits longer than this for another one has been deserted
_ranks: list[tuple[BaseProcess, Connection]] = []


def _dump(value: Any) -> bytes:
    """Plain bytes: a tensor in shared memory would need its sender to stay alive."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(pipe: Connection) -> None:
    """A rank's life: wait for work, join its group, do it, answer."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    while True:
        try:
            work, rank, world_size, store, args = _load(pipe.recv_bytes())
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=COLLECTIVE_SECONDS),
            )
            torch.manual_seed(0)
            answer = (True, work(rank, *args))
            dist.barrier()
        except BaseException:
            answer = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send_bytes(_dump(answer))


def _start(count: int) -> None:
    context = multiprocessing.get_context("spawn")
    while len(_ranks) < count:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _ranks.append((process, ours))


def _stop() -> None:
    for process, pipe in _ranks:
        pipe.close()
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
    _ranks.clear()


atexit.register(_stop)


def run_ranks(work: Callable[..., Any], world_size: int, *args: Any, fresh: bool = False) -> list[Any]:
    """What ``work(rank, *args)`` returned on each of ``world_size`` ranks.

    ``fresh`` takes new processes and ends them afterwards, for libraries that keep process groups for good.

    Raises:
        RuntimeError: a rank failed; the message holds the traceback of every rank that did.
    """
    if fresh:
        _stop()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _start(world_size)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        for rank in range(world_size):
            _ranks[rank][1].send_bytes(_dump((work, rank, world_size, str(store), args)))
        answers: list[tuple[bool, Any]] = []
        for rank in range(world_size):
            try:
                answers.append(_load(_ranks[rank][1].recv_bytes()))
            except EOFError:
                answers.append((False, f"the process died with exit code {_ranks[rank][0].exitcode}"))
    if fresh:
        _stop()
    failures = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
    if failures:
        if any(not process.is_alive() for process, _ in _ranks):
            _stop()  # start afresh; ranks that answered have left their group and can go on
        raise RuntimeError("\n".join(failures))
    return [value for _, value in answers]
