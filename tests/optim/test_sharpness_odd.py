"""Blockwise learning rates of models that are no plain decoder: no parameter is lost or taken twice, kinds are sane."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from memopt.optim import AdamW, blockwise_lr
from memopt.optim.sharpness import RATIOS, block_kinds


class Attention(nn.Module):
    """As T5's: no biases, positions as a small embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.relative = nn.Embedding(8, 4)


class Latent(nn.Module):
    """Multi-head latent attention: none of its layers makes queries, keys or values alone."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 10
        self.down, self.up = nn.Linear(32, 12), nn.Linear(12, 120)
        self.norm = nn.RMSNorm(12)
        self.sinks = nn.Parameter(torch.zeros(4))


class Adapted(nn.Module):
    """A layer with an adapter beside it, under names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.down, self.up = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(4, 32)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.RMSNorm(32)


class SelfPart(Around):
    pass


class CrossPart(Around):
    pass


class FeedPart(Around):
    pass


class Parts(nn.Module):
    """A layer whose parts are members of a list."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.layer = nn.ModuleList(parts)


def feed() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))


def encoder_decoder() -> nn.Module:
    shared = nn.Embedding(50, 32)
    encoder = [Parts(SelfPart(Attention()), FeedPart(feed())) for _ in range(2)]
    decoder = [Parts(SelfPart(Attention()), CrossPart(Attention()), FeedPart(feed())) for _ in range(2)]
    head = nn.Linear(32, 50, bias=False)
    head.weight = shared.weight
    return nn.ModuleDict(
        {"shared": shared, "encoder": nn.ModuleList(encoder), "decoder": nn.ModuleList(decoder), "head": head}
    )


class Bare(nn.Module):
    """Parameters held by no layer, one of them with no dimension, beside a layer without any norm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.tables = nn.ParameterList([torch.zeros(4, 4), torch.zeros(3)])
        self.block = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, kdim=16, vdim=24), "mix": feed()})
        self.other = nn.ModuleDict({"latent": Latent(), "mix": feed()})


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "encoder and decoder": (encoder_decoder, {}),
    "bare": (Bare, {}),
    "convolutions": (conv_net, {"kinds": {"0": "ffn"}}),
    "stack with a head": (
        lambda: nn.Sequential(*(nn.TransformerEncoderLayer(32, 4, 64) for _ in range(2)), nn.Linear(32, 10)),
        {},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_trained_parameter_is_in_one_group(name: str) -> None:
    make, options = MODELS[name]
    model = make()
    frozen = next(model.parameters()).requires_grad_(False)
    groups = blockwise_lr(model, 0.5, **options)
    held = [id(p) for group in groups for _, p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p is not frozen)
    assert all(group["lr"] in {0.5 * ratio for ratio in RATIOS.values()} for group in groups)
    assert sum(len(group["params"]) for group in AdamW(groups).param_groups) == len(held)


def test_lists_of_parts_are_layers_and_stacks_are_not() -> None:
    kinds = block_kinds(encoder_decoder())
    assert kinds["shared.weight"] == "embedding"
    for name, kind in kinds.items():
        wanted = (
            "embedding" if name == "shared.weight" else "ffn" if ".inner.0." in name or ".inner.2." in name else None
        )
        if wanted is None:
            leaf = name.split(".")[-2]
            wanted = {"q": "qk", "k": "qk", "v": "vo", "o": "vo", "norm": "norm", "relative": "other"}[leaf]
        assert kind == wanted, name
    stack = block_kinds(MODELS["stack with a head"][0]())
    assert (stack["2.weight"], stack["0.linear1.weight"]) == ("other", "ffn")


def test_what_an_attention_module_holds_besides() -> None:
    kinds = block_kinds(Bare())
    latent = {name.split(".")[2]: kind for name, kind in kinds.items() if ".latent." in name}
    assert latent == {"down": "qkv", "up": "qkv", "norm": "norm", "sinks": "other"}
    assert (kinds["scale"], kinds["tables.0"]) == ("other", "other")
    assert kinds["block.attention.k_proj_weight"] == "qk"
    assert kinds["block.mix.0.weight"] == "ffn"


def test_shared_parameters_are_found_by_each_of_their_names() -> None:
    model = encoder_decoder()
    groups = blockwise_lr(model, 1.0, kinds={"head": "other"})
    assert {name: group["lr"] for group in groups for name, _ in group["params"]}["shared.weight"] == 1.0


def test_groups_keep_their_own_rate_and_hold_a_parameter_once() -> None:
    model = nn.TransformerEncoderLayer(32, 4, 64)
    norms, linear = list(model.norm1.parameters()), model.linear1.weight
    groups = blockwise_lr(model, 1.0, groups=[{"params": norms, "lr": 0.1}, {"params": linear}])
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.1, 2), (6.0, 1)]
    with pytest.raises(ValueError, match=r"groups\[1\] holds 'linear1.weight' of shape \(64, 32\) again"):
        blockwise_lr(model, 1.0, groups=[{"params": [linear]}, {"params": [("other name", linear)]}])
    for wrong in ([linear], [{"lr": 0.1}], [None]):
        with pytest.raises(TypeError, match=r"groups\[0\] is a .*; it must be a dict with 'params'"):
            blockwise_lr(model, 1.0, groups=wrong)  # type: ignore[arg-type]


def test_models_and_rates_of_other_kinds_are_refused() -> None:
    model = nn.TransformerEncoderLayer(32, 4, 64)
    with pytest.raises(TypeError, match="model is a generator; it must be a module"):
        blockwise_lr(model.parameters(), 1.0)  # type: ignore[arg-type]
    for wrong in ("fast", -1.0, torch.ones(2)):
        with pytest.raises((TypeError, ValueError), match=r"^lr is"):
            blockwise_lr(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        blockwise_lr(model.requires_grad_(False), 1.0)
    with pytest.raises(ValueError, match="found no attention module"):
        blockwise_lr(conv_net(), 1.0)


def test_what_hides_queries_or_values_is_not_guessed_from_the_layers_left() -> None:
    attention = Attention()
    model = nn.ModuleDict({"attention": attention, "feed": feed()})
    assert set(block_kinds(model).values()) == {"qk", "vo", "ffn", "other"}
    attention.q, attention.v = Adapted(), Adapted()
    with pytest.raises(ValueError, match=r"found no attention module.* kinds="):
        blockwise_lr(model, 1.0)
    groups = blockwise_lr(model, 1.0, kinds={"attention.q": "qk", "attention.k": "qk", "feed": "ffn"})
    assert [(group["lr"], len(group["params"])) for group in groups] == [(8.0, 7), (1.0, 7), (10.0, 1), (6.0, 2)]
