"""A transformers ``config.json`` as a model on the meta device: transformers' own class where it is installed, else the
reference model of the same architecture for the families that have one."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memopt.planner.models.reference_models import Decoder, DecoderConfig

# The largest of each that anyone could mean: beyond it, building the model would take the machine down first.
_LARGEST = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "vocab_size", "intermediate_size", "n_inner"), 10**8),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 10**5),
    **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), 10**5),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), 10**4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "head_dim"), 10**9),
}
_LLAMA_LIKE = ("llama", "mistral", "mixtral", "qwen2", "qwen3")


def build_from_config(values: Any, batch: int, tokens: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and a batch for it; call it with the meta device and the default dtype set.

    Raises:
        ValueError: fields are missing or absurd, or no model can be built from them here.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("model_type"), str):
        raise ValueError("it has no model_type, so it is no transformers configuration")
    for name, largest in _LARGEST.items():
        size = values.get(name)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= largest):
            raise ValueError(f"{name} must be a whole number from 1 to {largest}, not {size!r}")
    dropout = values.get("resid_pdrop")
    if dropout is not None and (type(dropout) not in (int, float) or not 0 <= dropout < 1):
        raise ValueError(f"resid_pdrop must be a number from 0 to 1, not {dropout!r}")
    if importlib.util.find_spec("transformers") is not None:
        return _with_transformers(dict(values), batch, tokens)
    return _reference(values, batch, tokens)


def _with_transformers(values: dict[str, Any], batch: int, tokens: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        kind = values.pop("model_type")
        values.pop("torch_dtype", None)
        values.pop("dtype", None)
        try:
            config = transformers.AutoConfig.for_model(kind, **values)
            names = [name for name in values.get("architectures") or [] if hasattr(transformers, name)]
            if names:
                model = getattr(transformers, names[0])(config)
            else:
                model = _auto_class(transformers, config).from_config(config)
        except Exception as error:
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ValueError(f"transformers cannot build it: {first[0]}") from error
    model.train()
    return model, _transformers_batch(model, config, batch, tokens)


def _auto_class(transformers: Any, config: Any) -> Any:
    if hasattr(config, "image_size"):
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def _transformers_batch(model: nn.Module, config: Any, batch: int, tokens: int | None) -> dict[str, Tensor]:
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        channels = getattr(config, "num_channels", 3)
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        images = torch.empty(batch, channels, height, width)
        return {"pixel_values": images, "labels": torch.empty(batch, dtype=torch.long)}
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 4096
    length = min(longest, 4096) if tokens is None else tokens
    return {name: torch.empty(batch, length, dtype=torch.long) for name in ("input_ids", "labels")}


def _reference(values: Mapping[str, Any], batch: int, tokens: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    kind = values["model_type"]
    if kind == "gpt2":
        config = _gpt2(values)
    elif kind in _LLAMA_LIKE:
        config = _llama(values)
    else:
        raise ValueError(
            f"model_type {kind!r} needs transformers: pip install 'memopt[hf]' "
            f"(without it: {', '.join(_LLAMA_LIKE)}, gpt2)"
        )
    length = min(config.context, 4096) if tokens is None else tokens
    inputs = {name: torch.empty(batch, length, dtype=torch.long) for name in ("tokens", "targets")}
    return Decoder(config), inputs


def _field(values: Mapping[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise ValueError(f"it has no {name}")
    return values[name]


def _gpt2(values: Mapping[str, Any]) -> DecoderConfig:
    width = _field(values, "n_embd")
    return DecoderConfig(
        layers=_field(values, "n_layer"),
        width=width,
        heads=_field(values, "n_head"),
        mlp_width=values.get("n_inner") or 4 * width,
        vocabulary=_field(values, "vocab_size"),
        context=values.get("n_positions") or 1024,
        norm="layer",
        mlp="gelu",
        positions="learned",
        bias=True,
        tied=values.get("tie_word_embeddings", True),
        dropout=0.1 if values.get("resid_pdrop") is None else values["resid_pdrop"],
    )


def _llama(values: Mapping[str, Any]) -> DecoderConfig:
    kind = values["model_type"]
    experts = values.get("num_local_experts") or 0 if kind == "mixtral" else 0
    return DecoderConfig(
        layers=_field(values, "num_hidden_layers"),
        width=_field(values, "hidden_size"),
        heads=_field(values, "num_attention_heads"),
        kv_heads=values.get("num_key_value_heads") or 0,
        head_width=values.get("head_dim") or 0,
        mlp_width=_field(values, "intermediate_size"),
        vocabulary=_field(values, "vocab_size"),
        context=values.get("max_position_embeddings") or 4096,
        qkv_bias=kind == "qwen2" or values.get("attention_bias", False),
        qk_norm=kind == "qwen3",
        tied=values.get("tie_word_embeddings", False),
        experts=experts,
        experts_per_token=values.get("num_experts_per_tok") or 2 if experts else 0,
    )
