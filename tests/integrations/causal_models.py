"""Tiny random causal language models of transformers, and a guard that fails where all logits come to life."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.closeness import InDouble

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

V, T, B = 1024, 24, 2
CHUNK_BYTES = 2**14  # 4 of the 48 rows of logits in float32
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "loss_type": "ForCausalLM"}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "gemma2 softcap": ("Gemma2ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "cohere logit scale": ("CohereForCausalLM", {"logit_scale": 0.25}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "experts_implementation": "eager"}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "phi, a bias": ("PhiForCausalLM", {}),
    "granite divides": ("GraniteForCausalLM", {"logits_scaling": 4.0}),
}


def build(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """A model in training mode whose logits have a standard deviation of about one."""
    kind_name, own = ARCHITECTURES[name]
    kind = getattr(transformers, kind_name)
    torch.manual_seed(seed)
    model: nn.Module = kind(kind.config_class(**{**SMALL, **own, **options})).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def _batch() -> tuple[Tensor, Tensor]:
    """(tokens, labels) of shape (B, T), the first labels ignored."""
    tokens = torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :5] = -100
    return tokens, labels


TOKENS, LABELS = _batch()


def logits_of(model: nn.Module) -> Tensor:
    """The logits of the one batch that most tests run."""
    logits: Tensor = model(input_ids=TOKENS).logits
    return logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model, taken off it."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def exact_loss(model: nn.Module) -> float:
    """The loss of the one batch, in float64."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), InDouble():
        return exact(input_ids=TOKENS, labels=LABELS).loss.item()


class NoLogits(TorchDispatchMode):
    """Fails as soon as an operation makes a tensor of (tokens - 1) x vocabulary elements or more."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.numel() >= B * (T - 1) * V:
                raise AssertionError(f"{func} made a tensor of shape {tuple(leaf.shape)}: all logits")
        return output
