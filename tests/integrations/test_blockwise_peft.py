"""Blockwise learning rates under PEFT: what adapters adapt, and they with it, keeps its kind."""

from __future__ import annotations

from typing import Any

import pytest

from memopt.optim import blockwise_lr
from memopt.optim.rules.adam_mini import mini_groups
from memopt.optim.sharpness import RATIOS, block_kinds
from tests.integrations.causal_models import build

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks the old name

OPTIONS = {"gpt2": {"num_key_value_heads": 4}}  # it has as many as of queries
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, Any]] = {
    "queries and values": ("llama", peft.LoraConfig(target_modules=["q_proj", "v_proj"])),
    "all projections": ("llama", peft.LoraConfig(target_modules=PROJECTIONS)),
    "magnitudes": ("llama", peft.LoraConfig(target_modules=PROJECTIONS, use_dora=True)),
    "one layer, more than projections": (
        "qwen3",
        peft.LoraConfig(target_modules=["k_proj", "up_proj", "embed_tokens"], layers_to_transform=[0]),
    ),
    "trained copies": ("llama", peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["q_proj", "embed_tokens"])),
    "fused": ("gpt2", peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "vectors": ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "shared": ("llama", peft.VeraConfig(target_modules=["q_proj"], r=4, projection_prng_key=0)),
    "products": ("llama", peft.LoKrConfig(target_modules=["q_proj", "gate_proj"])),
}


def original(name: str) -> str:
    """The name that a module of a wrapped model had before, up to the projection, the embedding or the norm."""
    parts = [part for part in name.removeprefix("base_model.model.").split(".") if part not in ("model", "transformer")]
    ends = (*PROJECTIONS, "embed_tokens", "wte", "wpe", "c_attn", "c_proj", "c_fc", "lm_head")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part in ends), len(parts) - 2) + 1])


@pytest.mark.parametrize("case", CASES)
def test_adapters_and_what_they_adapt_have_the_kind_of_the_plain_layer(case: str) -> None:
    architecture, config = CASES[case]
    base = build(architecture, **OPTIONS.get(architecture, {}))
    plain = {original(name): kind for name, kind in block_kinds(base).items()}
    model = peft.get_peft_model(base, config)
    found = block_kinds(model)
    assert {name: plain[original(name)] for name in found} == found
    rates = {name: group["lr"] for group in blockwise_lr(model, 1.0) for name, _ in group["params"]}
    assert rates == {name: RATIOS[found[name]] for name, p in model.named_parameters() if p.requires_grad}


def test_trained_copies_of_queries_and_keys_are_in_blocks_of_heads_and_adapters_are_not() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["k_proj"])
    groups = mini_groups(peft.get_peft_model(build("llama", num_hidden_layers=1), config))
    held = [
        (group["rows_per_block"], [".".join(name.split(".")[-4:-1]) for name, _ in group["params"]]) for group in groups
    ]
    assert held == [
        (None, ["q_proj.lora_A.default", "q_proj.lora_B.default"]),
        (8, ["k_proj.modules_to_save.default"]),
    ]
