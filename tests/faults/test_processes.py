"""Forks, workers and threads around the native kernels and around plans."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import memopt
from memopt.kernels import dequantize_blockwise, quantize_blockwise
from memopt.optim import AdamW8bit
from memopt.planner.devices import Rates
from tests.optim.training import parameters, run

Result = TypeVar("Result")
SECONDS = 60.0
RATES = Rates("test", 1e9, 1e9, 1e8, 1e8, 10**12, "disk", overlap=False)


def in_child(work: Callable[[], bool]) -> int:
    """The exit status of a forked process: 0 where ``work`` returned true; killed after a minute."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError("the forked process hangs")


def on_threads(work: Callable[[int], Result], numbers: Iterable[int]) -> list[Result]:
    """What ``work`` returns for each number, each on a thread of its own, all started at once."""
    many = list(numbers)
    start = threading.Barrier(len(many))

    def begin(number: int) -> Result:
        start.wait(SECONDS)
        return work(number)

    with ThreadPoolExecutor(len(many)) as pool:
        return list(pool.map(begin, many))


def test_fork_after_use() -> None:
    """The child's step is the parent's, though the parent's OpenMP threads are not there."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        params = parameters([(600, 700)])
        optimizer = AdamW8bit(params)
        run(optimizer, 1)
        start = params[0].detach().clone()

        def one_step() -> bool:
            optimizer.step()
            return bool((params[0][0] != start[0]).all())  # one row: torch itself hangs on its threads here

        assert in_child(one_step) == 0
        assert torch.equal(params[0], start)
    finally:
        torch.set_num_threads(before)


class Rounded(Dataset[Tensor]):
    """Examples that pass through the quantisers in the worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        x = torch.arange(512.0) + index
        return dequantize_blockwise(quantize_blockwise(x, "sq127"))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context: str) -> None:
    here = torch.stack([Rounded()[i] for i in range(4)])
    loader = DataLoader(Rounded(), batch_size=4, num_workers=1, multiprocessing_context=context)
    (there,) = list(loader)
    assert torch.equal(there, here)


def test_a_hundred_threads_step_as_one() -> None:
    reference = parameters([(40, 300)])
    run(AdamW8bit(reference), 3)

    def work(_: int) -> Tensor:
        params = parameters([(40, 300)])
        run(AdamW8bit(params), 3)
        return params[0].detach()

    assert all(torch.equal(one, reference[0]) for one in on_threads(work, range(100)))


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 4 * width
        parts = [nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width)) for _ in range(6)]
        self.blocks = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def test_two_plans_in_one_process_on_two_threads() -> None:
    nets = {width: Net(width) for width in (24, 32)}

    def train(width: int) -> list[Tensor]:
        net = copy.deepcopy(nets[width])
        for _ in range(5):
            net(torch.ones(256, width)).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    def train_planned(width: int) -> list[Tensor]:
        net, inputs = copy.deepcopy(nets[width]), (torch.ones(256, width),)
        trace = memopt.trace(net, inputs)
        plan = memopt.plan(trace, memopt.plan(trace, trace.peak_bytes // 3, RATES).smallest_budget_bytes, RATES)
        assert plan.peak_bytes < trace.peak_bytes
        assert [block.path for block in trace.blocks] == [f"blocks.{i}" for i in range(6)]
        with memopt.apply(net, plan):
            for _ in range(5):
                net(*inputs).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    planned = dict(zip(nets, on_threads(train_planned, nets), strict=True))
    for width in nets:
        plain = train(width)
        assert len(planned[width]) == len(plain) == 24
        assert all(torch.equal(a, b) for a, b in zip(planned[width], plain, strict=True))
