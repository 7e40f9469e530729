"""A step whose activations exceed the memory that the process may have: it trains with the disk tier."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

CODE = """
    import resource, sys, torch
    from types import SimpleNamespace
    from torch import nn
    from memopt.offload import apply
    from memopt.planner.values import Action, BlockPlan, StorageAction

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1024))

        def forward(self, x):
            return (x * self.scale).relu().relu().relu().relu()

    torch.set_num_threads(1)
    blocks, rows = 17, 8192
    model = nn.Sequential(*[Block() for _ in range(blocks)])
    x = torch.randn(rows, 1024)
    saved_bytes = blocks * 4 * x.nbytes
    assert saved_bytes > 2 * 2**30
    # 2 GiB of private memory in all, code and libraries included: as a container of that size would enforce.
    resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30))
    if sys.argv[1] == "planned":
        actions = tuple(StorageAction(n, x.nbytes, Action.SWAP) for n in range(4))
        # A third of the blocks: enough to stay below the limit, and kind to slow disks.
        plan = SimpleNamespace(
            blocks=tuple(BlockPlan(str(n), 0, "", actions) for n in range(0, blocks, 3)), swap_tier="disk"
        )
        handle = apply(model, plan, swap_folder=sys.argv[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        loss = model(x).mean()
        loss.backward()
    except RuntimeError as error:
        print("out of memory" if "alloc" in str(error) else error)
        sys.exit(0)
    optimizer.step()
    print("trained", handle.tier.moved_bytes * 3 >= saved_bytes)
"""


def _run(mode: str, folder: Path) -> str:
    code = textwrap.dedent(CODE)
    done = subprocess.run([sys.executable, "-c", code, mode, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_activations_beyond_two_gibibytes(tmp_path: Path) -> None:
    assert _run("plain", tmp_path) == "out of memory"
    assert _run("planned", tmp_path) == "trained True"
    assert list(tmp_path.iterdir()) == []
