"""Long runs: nothing grows, and spikes in the loss do no more harm than to 32-bit states.

``MEMOPT_SOAK_STEPS=20000`` (in ``make soak``) runs what ``docs/reliability.md`` records.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memopt.optim import make
from tests.optim.training import gradients, parameters

STEPS = int(os.environ.get("MEMOPT_SOAK_STEPS", "1500"))
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit"])
def test_nothing_grows(name: str) -> None:
    """Held after every tenth of the run: from the second on, memory within 1 MiB, files and objects as they were."""
    params = parameters([(16, 300), (33,), ()])
    optimizer = make(name, params, lr=1e-3)
    gradients(params, 0)
    memory, files, objects, seconds = [], [], [], []
    for _ in range(10):
        start = time.process_time()
        for _ in range(STEPS // 10):
            optimizer.step()
        seconds.append(time.process_time() - start)
        gc.collect()
        memory.append(resident_bytes())
        files.append(open_files())
        objects.append(len(gc.get_objects()))
    assert max(memory[1:]) - memory[1] <= 2**20
    assert len(set(files[1:])) == 1
    assert max(objects[1:]) - objects[1] <= 50
    # CPU seconds of a tenth of the run, best of each half: a step that slows down with its number would show.
    assert min(seconds[5:]) <= 1.5 * min(seconds[:5])


def spiked_losses(name: str, **options: float) -> Tensor:
    """A linear model on noisy targets; one batch in 50 has targets a thousand times too large (SPAM's setting)."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(64, 8, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(64, 8))
    optimizer = make(name, [weight], lr=1e-2, weight_decay=0.0, **options)
    losses = []
    for step in range(600):
        x = torch.randn(32, 64, generator=generator)
        y = x @ truth + 0.1 * torch.randn(32, 8, generator=generator)
        loss = (x @ weight - (1000.0 if step % 50 == 49 else 1.0) * y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float((weight.detach() - truth).square().mean()))
    return torch.tensor(losses)


def test_spikes_do_no_more_harm_than_to_fp32() -> None:
    """Distance to the truth over the second half of the run: 4-bit within 10 % of fp32, without and with clipping."""
    tail = {
        (name, threshold): spiked_losses(name, **({"spike_threshold": threshold} if threshold else {}))[300:].mean()
        for name in ("adamw", "adamw4bit")
        for threshold in (0.0, 50.0)
    }
    for threshold in (0.0, 50.0):
        assert tail["adamw4bit", threshold] <= 1.1 * tail["adamw", threshold]
    assert tail["adamw4bit", 50.0] < 0.5 * tail["adamw4bit", 0.0]
