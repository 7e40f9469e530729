"""Kills a training run at random moments and resumes it: ``python -m tests.faults.killed 30``.

Each run is a process of its own that saves every few steps, in turns blocking and not, and is killed with SIGKILL
after a random time. The next one loads the newest checkpoint. At every step a run is held against the weights and the
loss that the uninterrupted run had at that step, bit for bit. The process that forks them never trains itself.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from memopt.integrations.checkpoints import Checkpoints, latest
from memopt.optim import make

KNOWN = 4000  # steps of the uninterrupted run, more than any other lives to see
EVERY = 3


class Run:
    """A small model with dropout, its low-bit optimizer, and batches drawn from the global random state."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(30, 300), nn.GELU(), nn.Dropout(0.2), nn.Linear(300, 30))
        self.optimizer = make("adamw8bit", self.model.parameters(), lr=1e-3)

    def step(self) -> str:
        """One step; a digest of its loss and of the weights it leaves."""
        x = torch.randn(8, 30)
        loss = (self.model(x) - x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        digest = hashlib.sha256(loss.detach().numpy().tobytes())
        for p in self.model.parameters():
            digest.update(p.detach().numpy().tobytes())
        return digest.hexdigest()[:16]


def write_reference(path: Path) -> None:
    """The digests of the uninterrupted run, a line a step."""
    run = Run()
    path.write_text("".join(run.step() + "\n" for _ in range(KNOWN)))


def train(folder: Path, reference: Path, progress: Path) -> None:
    """Resume, or begin, and train until killed; ends with an error where a step is not the uninterrupted run's."""
    expected = reference.read_text().split()
    run = Run()
    checkpoints = Checkpoints(folder)
    loaded = checkpoints.load(run.model, run.optimizer)
    first = loaded.step if loaded is not None else 0
    newest = latest(folder)
    if (newest is None) != (loaded is None):
        raise RuntimeError("what is found and what is loaded differ")
    with progress.open("a") as log:
        log.write(f"{os.getpid()} from {first}\n")
        for step in range(first, KNOWN):
            if run.step() != expected[step]:
                raise RuntimeError(f"step {step} after resuming from {first} is not the uninterrupted run's")
            log.write(f"{os.getpid()} step {step}\n")
            log.flush()
            if step % EVERY == EVERY - 1:
                checkpoints.save(step + 1, run.model, run.optimizer, blocking=step % (2 * EVERY) == EVERY - 1)
        time.sleep(60)  # to be killed here


def forked(work: Callable[[], None]) -> int:
    """The id of a process that does the work and nothing else."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> bool:
    """Whether the process has ended by itself; it stays there to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main(kills: int, seed: int) -> None:
    """Kill ``kills`` runs; prints where each began and ended.

    Raises:
        RuntimeError: a run ended by itself: a step was not bitwise right, or a checkpoint could not be read.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        reference, progress = root / "reference", root / "progress"
        child = forked(lambda: write_reference(reference))
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError("the uninterrupted run failed")
        moments = []
        for _ in range(kills):
            progress.write_text("")
            child = forked(lambda: train(root / "run", reference, progress))
            # One in four is killed while it starts or loads, the others after at least one step.
            waits = draw.random() > 0.25
            while waits and "step" not in progress.read_text() and not ended(child):
                time.sleep(0.002)
            time.sleep(draw.random() * 0.3)
            if ended(child):
                raise RuntimeError("a run ended by itself, see its error above")
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines = progress.read_text().splitlines()
            moments.append((int(lines[0].split()[-1]) if lines else None, max(len(lines) - 1, 0)))
        for first, steps in moments:
            begun = "while starting" if first is None else f"from step {first}, after {steps} more"
            sys.stdout.write(f"killed {begun}\n")
        checked = sum(steps for first, steps in moments if first)
        sys.stdout.write(f"{kills} kills; {checked} steps after resuming were bitwise the uninterrupted run's\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
