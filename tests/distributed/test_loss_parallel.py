"""The losses across ranks: a vocabulary in parts, and pairs that meet round a ring. Two gloo ranks on this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from memopt.kernels.losses import contrastive_loss, dense_linear_cross_entropy, linear_cross_entropy
from tests.distributed.ranks import run_ranks
from tests.kernels.loss_cases import check_no_further

V, H = 23, 8
SPLIT = 9  # rank 0 holds 9 entries, rank 1 the other 14: parts need not be equal


def vocabulary_inputs(dtype: torch.dtype, soft: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    target: Tensor = torch.randint(0, V, (3, 6), generator=generator)
    target[0, 2:4] = -100
    if soft:
        target = torch.randn(3, 6, V, generator=generator).softmax(-1)
    return {
        "hidden": torch.randn(3, 6, H, generator=generator).to(dtype),
        "weight": torch.randn(V, H, generator=generator).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "logit_scale": torch.tensor(1.3, dtype=dtype),
        "class_weight": torch.rand(V, generator=generator).to(dtype) + 0.1,
        "target": target,
    }


def with_gradients(function: Any, t: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    leaves = {name: t[name].clone().requires_grad_() for name in ("hidden", "weight", "bias", "logit_scale")}
    loss, stats = function(
        leaves["hidden"],
        leaves["weight"],
        t["target"],
        leaves["bias"],
        logit_scale=leaves["logit_scale"],
        class_weight=t["class_weight"],
        return_stats=True,
        **options,
    )
    (loss.sum() * 1.5).backward()
    return {"loss": loss.detach(), **stats._asdict(), **{name: leaf.grad for name, leaf in leaves.items()}}


def vocabulary_part(rank: int, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    t = vocabulary_inputs(dtype)
    own = slice(0, SPLIT) if rank == 0 else slice(SPLIT, V)
    for name in ("weight", "bias", "class_weight"):
        t[name] = t[name][own]
    made = with_gradients(linear_cross_entropy, t, process_group=dist.group.WORLD, **options)
    return {name: value.detach() for name, value in made.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"chunk_bytes": 200},  # rank 1 alone would make smaller chunks than rank 0
        {"mode": "recompute", "chunk_bytes": 500, "softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01},
        {"reduction": "none", "shift": 1, "label_smoothing": 0.2, "z_loss": 0.01},
        {"reduction": "sum", "accumulate": "float32"},
    ],
    ids=str,
)
def test_vocabulary_in_parts_equals_the_whole(options: dict[str, Any], dtype: torch.dtype) -> None:
    of_plain = {k: v for k, v in options.items() if k not in ("chunk_bytes", "mode", "accumulate")}
    whole = vocabulary_inputs(dtype)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in whole.items()}
    plain, truth = (with_gradients(dense_linear_cross_entropy, inputs, **of_plain) for inputs in (whole, wide))
    parts = run_ranks(vocabulary_part, 2, options, dtype)
    for name, value in truth.items():
        ours = [part[name] for part in parts]
        if name in ("weight", "bias"):
            ours = [torch.cat(ours)] * 2
        for one in ours:
            assert one.shape == value.shape, name
            check_no_further(name, one, plain[name].detach(), value.detach(), dtype)


def refused(rank: int) -> str:
    t = vocabulary_inputs(torch.float32, soft=True)
    own = slice(0, SPLIT) if rank == 0 else slice(SPLIT, V)
    with pytest.raises(ValueError, match="soft targets") as caught:
        linear_cross_entropy(t["hidden"], t["weight"][own], t["target"][..., own], process_group=dist.group.WORLD)
    t = vocabulary_inputs(torch.float32)
    with pytest.raises(ValueError, match="outside the vocabulary of 23 entries"):
        linear_cross_entropy(t["hidden"], t["weight"][own], t["target"].abs() + 5, process_group=dist.group.WORLD)
    weight = distribute_tensor(t["weight"], init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(ValueError, match=r"weight is a DTensor; pass weight.full_tensor\(\)"):
        linear_cross_entropy(t["hidden"], weight, t["target"])
    return str(caught.value)


def test_what_parts_of_a_vocabulary_cannot_do() -> None:
    assert all("process_group" in message for message in run_ranks(refused, 2))


def pair_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    q = F.normalize(torch.randn(10, 6, dtype=torch.float64, generator=generator), dim=1)
    k = F.normalize(q + torch.randn(10, 6, dtype=torch.float64, generator=generator) / 3, dim=1)
    return q.to(dtype), k.to(dtype), torch.tensor(9.5, dtype=dtype)


COUNTS = {2: (5, 5), 3: (2, 7, 1)}  # pairs of each rank


def contrastive_part(rank: int, ranks: int, dtype: torch.dtype) -> list[Tensor]:
    q, k, scale = (t.split(COUNTS[ranks])[rank] if t.dim() else t for t in pair_inputs(dtype))
    leaves = [t.clone().requires_grad_() for t in (q, k, scale)]
    loss = contrastive_loss(
        leaves[0], leaves[1], logit_scale=leaves[2], chunk_bytes=2 * 5 * 8, process_group=dist.group.WORLD
    )
    (2 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def contrastive_plain(dtype: torch.dtype, compute_in: torch.dtype) -> list[Tensor]:
    q, k, scale = (t.to(compute_in).requires_grad_() for t in pair_inputs(dtype))
    z = scale * (q @ k.t())
    loss = (F.cross_entropy(z, torch.arange(10)) + F.cross_entropy(z.t(), torch.arange(10))) / 2
    (2 * loss).backward()
    return [loss.detach(), q.grad, k.grad, scale.grad]


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (3, torch.float64)], ids=str)
def test_pairs_meet_round_the_ring(ranks: int, dtype: torch.dtype) -> None:
    parts = run_ranks(contrastive_part, ranks, ranks, dtype)
    assert all(torch.equal(part[0], parts[0][0]) for part in parts)
    ours = [parts[0][0], *(torch.cat([part[n] for part in parts]) for n in (1, 2)), sum(part[3] for part in parts)]
    plain, truth = contrastive_plain(dtype, dtype), contrastive_plain(dtype, torch.float64)
    for name, *values in zip(("loss", "queries", "keys", "scale"), ours, plain, truth, strict=True):
        check_no_further(name, *values, dtype)


def widths_differ(rank: int) -> str:
    q = torch.ones(3, 4 + rank)
    with pytest.raises(ValueError, match="one width on all ranks") as caught:
        contrastive_loss(q, q, logit_scale=1.0, process_group=dist.group.WORLD)
    return str(caught.value)


def test_widths_that_differ_are_named() -> None:
    assert run_ranks(widths_differ, 2) == ["queries and keys must have one width on all ranks, got [4, 5] by rank"] * 2
