"""Blockwise learning rates: which parameter is of which kind, and what the groups hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from examples.gpt import GPT, GPTConfig
from memopt.optim import AdamMini, AdamW, blockwise_lr
from memopt.optim.rules.adam_mini import mini_groups
from memopt.optim.sharpness import block_kinds
from tests.optim.training import gradients

CONFIG = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=32)


class GroupedQuery(nn.Module):
    """Heads in its config, as Llama's; the names of its layers say nothing, so their order decides."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.head_dim = CONFIG, 8
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.d = nn.Linear(32, 32)
        self.q_norm = nn.RMSNorm(8)


class KeysFirst(nn.Module):
    """Keys, values, queries: like sizes in an order of their own, as OPT has them; names decide."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.k_proj, self.v_proj, self.q_proj = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out_proj = nn.Linear(32, 32)


class WithoutOutput(nn.Module):
    """As BERT's: the output layer is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads = 4
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)


class Gated(nn.Module):
    """A feed-forward layer that knows the model's config, but is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)


class Experts(nn.Module):
    """A mixture: a router, and its experts as one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 3)
        self.weight = nn.Parameter(torch.randn(3, 32, 32))


class Layer(nn.Module):
    def __init__(self, attention: nn.Module, mixing: nn.Module, *, output: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attention = nn.ModuleDict({"self": attention, "output": nn.Linear(32, 32)}) if output else attention
        self.mixing = mixing
        self.scale = nn.Parameter(torch.ones(32))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        self.position = nn.Parameter(torch.zeros(8, 32))
        self.layers = nn.ModuleList(
            [
                Layer(GroupedQuery(), Gated()),
                Layer(KeysFirst(), Experts()),
                Layer(WithoutOutput(), nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), output=True),
                Layer(nn.MultiheadAttention(32, 4), nn.Linear(32, 32)),
            ]
        )
        self.head = nn.Linear(32, 50, bias=False)


EXPECTED = {
    "embedding": "tokens.weight",
    "qk": "0.attention.a 0.attention.b 1.attention.k_proj 1.attention.q_proj 2.attention.self.query "
    "2.attention.self.key",
    "vo": "0.attention.c 0.attention.d 1.attention.v_proj 1.attention.out_proj 2.attention.self.value "
    "2.attention.output 3.attention.out_proj",
    "qkv": "3.attention.in_proj_weight 3.attention.in_proj_bias",
    "ffn": "0.mixing 1.mixing 2.mixing 3.mixing",
    "norm": "0.norm 1.norm 2.norm 3.norm 0.attention.q_norm",
    "other": "position head.weight 0.scale 1.scale 2.scale 3.scale",
}


def expected(name: str) -> str:
    tail = name.removeprefix("layers.")
    return next(
        kind for kind, starts in EXPECTED.items() for start in starts.split() if f"{tail}.".startswith(f"{start}.")
    )


def test_kinds_come_from_structure() -> None:
    found = block_kinds(Model())
    assert found == {name: expected(name) for name in found}


def test_demo_model_and_tied_output_layer() -> None:
    model = GPT(GPTConfig(layers=2, width=32, heads=4))
    model.head.weight = model.token.weight
    found = block_kinds(model)
    assert (found["token.weight"], found["position.weight"]) == ("embedding", "embedding")
    assert found["blocks.1.attention.qkv.weight"] == "qkv"
    assert found["blocks.1.attention.out.bias"] == "vo"
    assert found["blocks.0.down.weight"] == "ffn"
    assert "head.weight" not in found


def test_groups_hold_every_trained_parameter_once_at_its_rate() -> None:
    model = Model()
    model.tokens.weight.requires_grad_(False)
    optimizer = AdamW(blockwise_lr(model, 1e-4, ratios={"ffn": 5.0}), state="8bit", weight_decay=0.0)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    kinds = block_kinds(model)
    assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    ratio = {"qk": 8, "ffn": 5, "vo": 4, "qkv": 4, "norm": 1, "other": 1}
    assert rates == pytest.approx({name: ratio[kinds[name]] * 1e-4 for name in rates})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    gradients(list(model.parameters()), 0)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [
        group["initial_lr"] / 2 for group in optimizer.param_groups
    ]


def test_a_user_names_kinds_and_keeps_group_options() -> None:
    model = Model()
    groups = blockwise_lr(model, 1.0, kinds={"head": "embedding", "position": "embedding"}, groups=mini_groups(model))
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert rates["head.weight"] == rates["position"] == 10.0
    rows = {name: group["rows_per_block"] for group in groups for name, _ in group["params"]}
    assert rows["layers.0.attention.a.weight"] == 8
    assert rows["layers.0.mixing.down.weight"] is None
    AdamMini(groups)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no attention module"):
        blockwise_lr(nn.Linear(3, 4), 1e-3)
    with pytest.raises(ValueError, match="kinds names 'nowhere'"):
        blockwise_lr(Model(), 1e-3, kinds={"nowhere": "qk"})
    with pytest.raises(ValueError, match="kinds gives 'head' the kind 'tail'"):
        blockwise_lr(Model(), 1e-3, kinds={"head": "tail"})
    with pytest.raises(ValueError, match="ffn is -1"):
        blockwise_lr(Model(), 1e-3, ratios={"ffn": -1.0})
    with pytest.raises(ValueError, match=r"groups\[0\] holds a parameter of shape \(2,\)"):
        blockwise_lr(Model(), 1e-3, groups=[{"params": [nn.Parameter(torch.zeros(2))]}])
