"""Flat parameters whose parts are no whole blocks: each rank keeps and works on the blocks that begin in its part."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from memopt.optim import convert
from memopt.optim.reaching import Share, parts_of, recut
from tests.distributed.ranks import run_ranks
from tests.distributed.test_optim_sharded import STATES, advance, build, held_bytes, resume, save, shapes, whole

FLAT = {name: shapes()[name] for name in ("long_bias", "short_rows")}
KAHAN: Any = ("AdamW", torch.bfloat16, {"state": "4bit", "param_rounding": "kahan"})


def moved(rank: int, cuts: list[tuple[int, ...]]) -> list[list[Tensor]]:
    """Three tensors of many types as they are cut at first, recut again and again."""
    wholes = [torch.arange(cuts[0][-1]).to(kind) for kind in (torch.float32, torch.bfloat16, torch.uint8)]
    parts = [whole[cuts[0][rank] : cuts[0][rank + 1]] for whole in wholes]
    found = []
    for before, after in pairwise(cuts):
        parts = recut(parts, before, after, rank, dist.group.WORLD)
        found.append(parts)
    return found


def test_elements_go_where_the_cuts_say() -> None:
    """Empty parts at either end and in the middle among them."""
    draw = random.Random(0)
    cuts = [(0, 0, 0, 97), (0, 97, 97, 97), (0, 30, 30, 97)]
    cuts += [(0, *sorted(draw.choices(range(98), k=2)), 97) for _ in range(20)]
    for rank, found in enumerate(run_ranks(moved, 3, cuts)):
        for cut, parts in zip(cuts[1:], found, strict=True):
            for part in parts:
                wanted = torch.arange(cut[rank], cut[rank + 1]).to(part.dtype)
                assert torch.equal(part, wanted)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("shape", [(9001,), (300, 50), (17, 250), (4096,)])
def test_shares_are_whole_blocks_and_no_longer_than_parts_and_a_block(shape: tuple[int, ...], ranks: int) -> None:
    for rank in range(ranks):
        share = Share(torch.empty(shape), 256, None, rank, parts_of(shape, ranks))  # type: ignore[arg-type]
        assert share.offset == share.worked[rank]
        assert share.offset % 256 == 0 or share.offset == share.cuts[-1]
        part = share.cuts[rank + 1] - share.cuts[rank]
        assert 0 <= share.extent.local[0] < part + 256
    assert share.worked[-1] == share.cuts[-1] == torch.Size(shape).numel()
    chunks = torch.arange(share.cuts[-1]).view(shape).chunk(ranks)
    assert [int(chunk.flatten()[0]) for chunk in chunks] == list(share.cuts[: len(chunks)])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("state", STATES)
def test_every_rank_keeps_its_share(state: str, world_size: int) -> None:
    made = ("AdamW", torch.float32, {"state": state})
    parts = run_ranks(held_bytes, world_size, *made, True, FLAT)
    assert sum(parts) == held_bytes(0, *made, False, FLAT)
    rows = sum(torch.Size(shape).numel() // shape[0] for shape in FLAT.values())
    blocks = 256 * len(FLAT)  # a part has up to a row more than its share, and a share a block more than its part
    assert max(parts) <= sum(parts) / world_size + (rows + blocks) * 8


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_compensations_and_codes_are_resharded(before: int, after: int, tmp_path: Path) -> None:
    expected = advance(*build(*KAHAN, False, FLAT), range(5))
    run_ranks(save, before, str(tmp_path), *KAHAN, before > 1, FLAT)
    for got in run_ranks(resume, after, str(tmp_path), *KAHAN, after > 1, FLAT):
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


def converted(rank: int) -> None:
    """Another library's whole state dict, codes included, loads into a sharded optimizer; a sharded one is refused."""
    plain, sharded = (build("AdamW", torch.float32, {"state": "8bit-dynamic"}, cut, shapes()) for cut in (False, True))
    advance(*plain, range(2))
    sharded[1].load_state_dict(
        convert(convert(plain[1].state_dict(), "memopt", "bitsandbytes"), "bitsandbytes", sharded[1])
    )
    ours, theirs = (optimizer.state_dict()["state"] for _, optimizer in (sharded, plain))
    for number in (1, 5, 6, 7):  # whole blocks in a row, or flat
        for name, value in theirs[number].items():
            assert torch.equal(whole(ours[number][name]), value), (number, name)
    with pytest.raises(ValueError, match=r"parameter 0 of the state dict is sharded; convert the full one"):
        convert(sharded[1].state_dict(), "memopt", "torch")


def test_whole_state_dicts_are_converted_for_sharded_optimizers() -> None:
    run_ranks(converted, 2)
