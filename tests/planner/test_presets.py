"""Presets, transformers configurations and a user's own function as models to trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from memopt.planner import ModelError, find_model, preset_names, trace
from memopt.planner.models.reference_models import Decoder, DecoderConfig, VisionConfig, VisionTransformer
from memopt.planner.tracing.named_optimizers import NamedOptimizer

PRESETS = Path(__file__).parents[2] / "memopt" / "presets" / "models"
TINY = DecoderConfig(layers=2, width=64, heads=4, kv_heads=2, mlp_width=96, vocabulary=100, context=32)


@pytest.mark.parametrize("name", preset_names())
def test_parameters_are_as_published(name: str) -> None:
    model = find_model(name).model
    published = json.loads((PRESETS / f"{name}.json").read_text())["parameters"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_people_ask_for_is_there() -> None:
    wanted = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama-3-8b", "llama-3-70b", "mistral-7b", "mixtral-8x7b"}
    assert wanted <= set(preset_names())
    assert any(name.startswith("qwen") for name in preset_names())
    assert any(name.startswith("vit") for name in preset_names())


def test_batch_tokens_and_dtype() -> None:
    found = find_model("GPT2", batch=3, tokens=100, dtype="fp32")
    assert found.inputs["tokens"].shape == (3, 100)
    assert next(found.model.parameters()).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert next(find_model("gpt2").model.parameters()).dtype == torch.bfloat16


def test_a_preset_traces_for_cuda() -> None:
    found = find_model("gpt2", tokens=128)
    traced = trace(found.model, found.inputs, found.loss_fn, "adamw8bit", device="cuda")
    assert len(traced.blocks) == 12
    assert {block.group for block in traced.blocks} == {0}
    assert traced.dtype == "bfloat16"


@pytest.mark.parametrize(
    "model",
    [
        Decoder(TINY),
        Decoder(
            DecoderConfig(2, 64, 4, 96, 100, 32, norm="layer", mlp="gelu", positions="learned", bias=True, tied=True)
        ),
        Decoder(DecoderConfig(2, 64, 4, 96, 100, 32, qk_norm=True, head_width=32, qkv_bias=True)),
        Decoder(DecoderConfig(2, 64, 4, 96, 100, 32, experts=4, experts_per_token=2, expert_width=32)),
    ],
    ids=["llama", "gpt2", "qwen", "mixtral"],
)
def test_reference_decoders_run_and_learn(model: Decoder) -> None:
    tokens = torch.arange(64).reshape(2, 32) % 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model(tokens).shape == (2, 32, 100)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_decoders_do_not_look_ahead() -> None:
    model = Decoder(TINY).eval()
    tokens = torch.arange(32).reshape(1, 32)
    changed = tokens.clone()
    changed[0, 20] = 99
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


def test_reference_vision_transformer_runs() -> None:
    model = VisionTransformer(VisionConfig(2, 32, 4, 64, 32, 8, 10))
    images, labels = torch.ones(2, 3, 32, 32), torch.tensor([1, 2])
    model(images, labels).backward()
    assert model(images).shape == (2, 10)


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write(folder: Path, values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize("installed", [True, False], ids=["with transformers", "without"])
def test_transformers_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    if not installed:
        monkeypatch.setattr("memopt.planner.models.transformers_configs.importlib.util.find_spec", lambda name: None)
    path = write(tmp_path, LLAMA)
    parameters = []
    for place in (path, tmp_path):
        found = find_model(place, batch=2, tokens=16, dtype="fp32")
        parameters.append(sum(parameter.numel() for parameter in found.model.parameters()))
    assert parameters[0] == parameters[1] == 40672
    traced = trace(found.model, found.inputs, found.loss_fn)
    assert len(traced.blocks) == 3


def test_the_reference_of_gpt2_has_the_size_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 200, "n_positions": 64,
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    path = write(tmp_path, values)
    real = find_model(path).model
    monkeypatch.setattr("memopt.planner.models.transformers_configs.importlib.util.find_spec", lambda name: None)
    reference = find_model(path).model
    assert sum(p.numel() for p in reference.parameters()) == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "not JSON"),
        ([1], "no model_type"),
        ({"hidden_size": 3}, "no model_type"),
        ({**LLAMA, "hidden_size": -1}, "hidden_size must be a whole number from 1"),
        ({**LLAMA, "num_hidden_layers": "many"}, "num_hidden_layers must be"),
        ({**LLAMA, "vocab_size": 10**12}, "vocab_size must be"),
        ({**LLAMA, "num_attention_heads": 5}, "cannot build"),
        ({"model_type": "nonsense"}, "cannot build"),
    ],
)
def test_bad_configurations_say_what_is_wrong(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_model(write(tmp_path, values))


def test_without_transformers_fields_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memopt.planner.models.transformers_configs.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="it has no intermediate_size"):
        find_model(write(tmp_path, {k: v for k, v in LLAMA.items() if k != "intermediate_size"}))
    with pytest.raises(ModelError, match="needs transformers"):
        find_model(write(tmp_path, {**LLAMA, "model_type": "mamba"}))


def test_a_python_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_memopt.py").write_text(
        "import torch\n"
        "def make(): return torch.nn.Linear(4, 4), torch.ones(2, 4), lambda y: y.square().mean()\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    found = find_model("mine_for_memopt:make")
    assert trace(found.model, found.inputs, found.loss_fn).peak_bytes > 0
    with pytest.raises(ModelError, match="must return"):
        find_model("mine_for_memopt:wrong")
    with pytest.raises(ModelError, match="has no 'nothing'"):
        find_model("mine_for_memopt:nothing")
    with pytest.raises(ModelError, match="cannot import"):
        find_model("no_such_module_here:make")


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'gpt5'.*llama-3-8b"):
        find_model("gpt5")
    with pytest.raises(ModelError, match="unknown dtype"):
        find_model("gpt2", dtype="int3")
    with pytest.raises(ModelError, match="batch must be from 1 to"):
        find_model("gpt2", batch=0)
    with pytest.raises(ModelError, match="learned positions"):
        find_model("gpt2", tokens=5000)
    with pytest.raises(ModelError, match="seq is for language models"):
        find_model("vit-b-16", tokens=5)
    with pytest.raises(ModelError, match="does not exist"):
        find_model("missing.json")


@pytest.mark.parametrize(
    ("name", "bytes_each"), [("adamw", 8), ("AdamW-8bit", 2.03125), ("lion_4bit", 0.53125), ("sgdbf16", 2)]
)
def test_optimizers_by_name_keep_their_bytes(name: str, bytes_each: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(100, 100))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = NamedOptimizer([parameter], name)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[parameter]["moments"].nbytes == math.ceil(10000 * bytes_each)


def test_small_parameters_keep_32_bit_states() -> None:
    parameter = torch.nn.Parameter(torch.zeros(100))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = NamedOptimizer([parameter], "adamw8bit")
    optimizer.step()
    assert optimizer.state[parameter]["moments"].nbytes == 800


def test_unknown_optimizers_list_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'adagrd'.*lion"):
        trace(torch.nn.Linear(2, 2), torch.ones(1, 2), None, "adagrd")
