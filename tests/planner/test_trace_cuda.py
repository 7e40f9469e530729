"""Traces for CUDA: what its kernels save and allocate, on a machine without one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memopt.planner import trace
from memopt.planner.tracing.cuda_rules import workspace_bytes
from tests.planner import nets

TOKENS = torch.zeros(4, 64, dtype=torch.long)


class Head(nn.Module):
    """Attention alone, with what is asked of it."""

    def __init__(self, width: int = 64, heads: int = 4, keys: int = 4, mask: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.keys, self.mask = heads, keys, mask
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width * keys // heads)
        self.v = nn.Linear(width, width * keys // heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = (part(x).view(batch, tokens, self.keys, -1).transpose(1, 2) for part in (self.k, self.v))
        grouped = self.keys != self.heads
        causal = self.mask is None
        y = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=causal, enable_gqa=grouped)
        return x + y.transpose(1, 2).flatten(2)


def saved(model: nn.Module, x: Tensor, device: str) -> dict[str, int]:
    traced = trace(nn.Sequential(model, model), x, device=device)
    totals: dict[str, int] = {}
    for storage in traced.blocks[1].saved:
        name = traced.ops[storage.producer].name.split(".")[1]
        totals[name] = totals.get(name, 0) + storage.bytes
    return totals


def test_flash_attention_saves_its_output_and_one_number_a_row() -> None:
    x = torch.ones(2, 128, 64, dtype=torch.bfloat16)
    found = saved(Head().bfloat16(), x, "cuda")
    rows, heads, width = 2 * 128, 4, 64
    assert found["_scaled_dot_product_flash_attention"] == rows * width * 2 + rows * heads * 4 + 2 * 512  # and 2 seeds


def test_grouped_heads_save_small_keys() -> None:
    x = torch.ones(2, 128, 64, dtype=torch.bfloat16)
    found = saved(Head(keys=2).bfloat16(), x, "cuda")
    assert found["addmm"] == 2 * 128 * (64 + 32 + 32) * 2


def test_float32_and_masks_take_the_memory_efficient_kernel() -> None:
    assert "_scaled_dot_product_efficient_attention" in saved(Head(), torch.ones(2, 128, 64), "cuda")
    masked = Head(mask=torch.ones(128, 128, dtype=torch.bool).tril()).bfloat16()
    found = saved(masked, torch.ones(2, 128, 64, dtype=torch.bfloat16), "cuda")
    assert "_scaled_dot_product_efficient_attention" in found
    assert not any("math" in name or "softmax" in name for name in found)


def test_odd_heads_are_padded() -> None:
    found = saved(Head(width=40, heads=4).bfloat16(), torch.ones(1, 64, 40, dtype=torch.bfloat16), "cuda")
    assert found["_scaled_dot_product_flash_attention"] == 64 * 4 * 16 * 2 + 64 * 4 * 4 + 2 * 512


def test_dropout_saves_one_byte_an_element() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.Linear(64, 64))
    on_gpu = trace(model, torch.ones(64, 64), device="cuda")
    assert any(op.name.startswith("aten.native_dropout.") and op.random for op in on_gpu.ops)
    masks = [s for s in on_gpu.storages if s.producer is not None and s.bytes == 64 * 64]
    assert len(masks) == 1


def test_rms_norm_saves_one_number_a_row() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    found = saved(Normed(), torch.ones(256, 64), "cuda")
    assert found == {"_fused_rms_norm": 256 * 4 + 256 * 64 * 4}
    assert len(saved(Normed(), torch.ones(256, 64), "cpu")) > 1


def test_sizes_are_multiples_of_512_and_cublas_has_its_workspace() -> None:
    traced = trace(nets.GPT(), (TOKENS, TOKENS), device="cuda")
    assert all(storage.bytes % 512 == 0 for storage in traced.storages)
    assert any(storage.bytes == workspace_bytes() for storage in traced.storages)
    assert traced.meta["device"] == "cuda"


def test_torch_optimizers_update_all_at_once() -> None:
    model = nets.GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    on_gpu = trace(model, (TOKENS, TOKENS), None, optimizer, device="cuda")
    assert any("_foreach_" in op.name for op in on_gpu.ops)
    one_by_one = trace(
        model, (TOKENS, TOKENS), None, torch.optim.AdamW(model.parameters(), foreach=False), device="cuda"
    )
    assert not any("_foreach_" in op.name for op in one_by_one.ops)
    assert not any("_foreach_" in op.name for op in trace(model, (TOKENS, TOKENS), None, optimizer).ops)


def test_autocast_casts_what_attention_reads() -> None:
    model = nn.Sequential(Head(), Head())
    traced = trace(model, torch.ones(2, 64, 64), autocast=torch.bfloat16, device="cuda")
    assert any("flash_attention" in op.name for op in traced.ops)


def test_gradients_follow_the_replaced_kernels() -> None:
    traced = trace(nets.GPT(dropout=0.1, dtype=torch.bfloat16), (TOKENS, TOKENS), device="cuda")
    names = {op.name.split(".")[1] for op in traced.ops if op.phase.value == "backward"}
    assert {"_scaled_dot_product_flash_attention_backward", "native_dropout_backward"} <= names
    assert all(math.isfinite(op.flops) for op in traced.ops)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device must be"):
        trace(nets.GPT(), (TOKENS, TOKENS), device="tpu")
