"""transformers models trace as they run: causal LMs, encoder-decoders, vision, experts, state spaces."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import memopt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(2 * 32).reshape(2, 32) % 150 + 10
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
LABELS = torch.tensor([0, 1])
TEXT = {"input_ids": TOKENS, "labels": TOKENS}
MASKED = {**TEXT, "attention_mask": torch.ones_like(TOKENS)}
PADDED = {**TEXT, "attention_mask": (torch.arange(32) < 20).long().expand(2, -1)}
SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {**SMALL, **IDS, "num_key_value_heads": 2}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor], int]] = {
    "llama": ("LlamaForCausalLM", LLAMA, TEXT, 2),
    "llama with a full mask": ("LlamaForCausalLM", LLAMA, MASKED, 2),
    "llama with padding": ("LlamaForCausalLM", LLAMA, PADDED, 2),
    "gpt2": (
        "GPT2LMHeadModel",
        {**IDS, "vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        MASKED,
        2,
    ),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}, MASKED, 2),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4,
         "decoder_start_token_id": 0},
        TEXT,
        6,
    ),
    "bert": ("BertForMaskedLM", SMALL, MASKED, 2),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "image_size": 32, "patch_size": 8},
        {"pixel_values": IMAGES, "labels": LABELS},
        2,
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"},
        {"pixel_values": IMAGES, "labels": LABELS},
        4,
    ),
}  # fmt: skip


def build(name: str, options: dict[str, Any]) -> torch.nn.Module:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options)).train()


@pytest.mark.parametrize("case", CASES)
def test_traced_and_metered_peaks_agree(case: str) -> None:
    name, options, inputs, blocks = CASES[case]
    model = build(name, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    traced = memopt.trace(model, inputs, optimizer=optimizer)
    with memopt.meter(model, optimizer):  # the first step makes the state
        model(**inputs).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    with memopt.meter(model, optimizer) as found:
        output = model(**inputs)
        output.loss.backward()
        optimizer.step()
    assert traced.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)
    assert len(traced.blocks) == blocks
    assert all(block.saved for block in traced.blocks)


def test_a_model_on_the_meta_device_traces_like_a_real_one() -> None:
    name, options, inputs, _ = CASES["llama"]
    with torch.device("meta"):
        model = build(name, options)
    nothing = {key: torch.empty_like(value, device="meta") for key, value in inputs.items()}
    real = memopt.trace(build(name, options), inputs)
    assert memopt.trace(model, nothing).peak_bytes == pytest.approx(real.peak_bytes, rel=0.002)


def test_the_model_s_library_is_left_as_it_was() -> None:
    from transformers.utils import import_utils

    asked = import_utils.is_fake_tensor
    name, options, inputs, _ = CASES["llama"]
    memopt.trace(build(name, options), inputs)
    assert import_utils.is_fake_tensor is asked
