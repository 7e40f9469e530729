"""Blocks found from the structure of models of many kinds, and blocks given by users."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memopt.optim.coverage.blocks import find_blocks, given_blocks
from tests.optim.coverage_models import Layer, tiny


def names(model: nn.Module) -> list[str]:
    blocks = find_blocks(model)
    seen = [name for block in blocks for name in block.names]
    assert sorted(seen) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return [block.name for block in blocks]


def test_layers_are_blocks_and_the_rest_is_one_before_and_one_after() -> None:
    blocks = find_blocks(tiny())
    assert [b.name for b in blocks] == ["model", "layers.0", "layers.1", "layers.2", "norm"]
    assert blocks[0].names == ("position", "embed.weight")
    assert blocks[4].names == ("norm.weight", "norm.bias", "head.weight")
    assert blocks[1].numel == sum(p.numel() for p in Layer(72).parameters())


def test_encoder_and_decoder_keep_their_own_layers() -> None:
    model = nn.Transformer(8, 2, num_encoder_layers=2, num_decoder_layers=3, dim_feedforward=16, batch_first=True)
    assert names(model) == [
        *("encoder.layers.0", "encoder.layers.1", "encoder.norm"),
        *("decoder.layers.0", "decoder.layers.1", "decoder.layers.2", "decoder.norm"),
    ]


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = Tower(), Tower()


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3)
        self.first, self.second = Layer(4), Layer(6)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(nn.Sequential(Layer(4), Layer(4)) for _ in range(2)))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (TwoTowers(), ["query.layers.0", "query.layers.1", "key.layers.0", "key.layers.1"]),
        (Siblings(), ["stem", "first", "second"]),
        (Stages(), ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]),
        (nn.Linear(3, 3), ["model"]),
        (nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Embedding(3, 2)}), ["a", "b"]),
    ],
    ids=["two towers", "siblings without a list", "nested stages", "one module", "dict"],
)
def test_structures(model: nn.Module, expected: list[str]) -> None:
    assert names(model) == expected


def test_shared_and_frozen_parameters_are_counted_once_and_not_at_all() -> None:
    model = tiny()
    model.head.weight = model.embed.weight
    model.layers[1].requires_grad_(False)
    blocks = find_blocks(model)
    assert [b.name for b in blocks] == ["model", "layers.0", "layers.2", "norm"]
    assert "embed.weight" in blocks[0].names
    assert blocks[-1].names == ("norm.weight", "norm.bias")


def test_blocks_of_transformers_models() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    assert names(llama) == [
        *("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm"),
    ]
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    assert [n for n in names(t5) if "block" in n] == [
        *("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
    ]


def test_given_blocks_by_name_module_parameter_and_list() -> None:
    model = tiny()
    named = dict(model.named_parameters())
    blocks = given_blocks(
        ["layers.0", model.layers[1], [model.layers[2], model.norm, "head"], [model.position, "embed.weight", "norm"]],
        named,
    )
    assert blocks[0].name == "layers.0"
    assert blocks[1].names[0] == "layers.1.norm.weight"
    assert blocks[2].names[-1] == "head.weight"
    assert blocks[3].names == ("position", "embed.weight", "norm.weight", "norm.bias")


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (["nothing"], ValueError, "'nothing'"),
        (["layer"], ValueError, "'layer'"),
        ([[]], ValueError, "block 0"),
        ([torch.zeros(2, 3)], ValueError, r"shape \(2, 3\)"),
        (["layers", "head"], ValueError, "4 parameters are in no block"),
        ([3], TypeError, "int"),
    ],
)
def test_wrong_blocks_say_what_is_wrong(blocks: list[object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        given_blocks(blocks, dict(tiny().named_parameters()))


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        find_blocks(nn.Linear(2, 2).requires_grad_(False))
