"""A LoRA adapter of PEFT on the output head, as one product: ``[x, s A(x)] @ [W, B].T``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

_MODULE = "peft.tuners.lora.layer"


def is_lora(head: Any) -> bool:
    """Whether this is PEFT's linear layer with LoRA adapters over an ordinary linear layer."""
    module = sys.modules.get(_MODULE)
    if module is None or type(head) is not module.Linear:
        return False
    return type(head.base_layer).forward is nn.Linear.forward


def lora_product(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(hidden, weight, bias) whose product is what the layer computes, its dropout drawn as it would draw it.

    None for the variants whose change is no product of hidden states alone, such as DoRA. The adapters are computed in
    their own dtype and rounded to the weight's. Cost: a copy of the weight with the ranks of the active adapters added
    to its columns.
    """
    base = head.base_layer
    weight, bias = base.weight, base.bias
    if head.disable_adapters and head.merged:
        return None
    names = [] if head.disable_adapters or head.merged else [n for n in head.active_adapters if n in head.lora_A]
    for name in names:
        up = head.lora_B[name]
        if name in head.lora_variant or up.bias is not None or type(up).forward is not nn.Linear.forward:
            return None
    if not names:
        return hidden, weight, bias
    inputs, columns = [hidden], [weight]
    for name in names:
        down, dropout, up = head.lora_A[name], head.lora_dropout[name], head.lora_B[name]
        x = head._cast_input_dtype(hidden, down.weight.dtype)
        inputs.append((down(dropout(x)) * head.scaling[name]).to(hidden.dtype))
        columns.append(up.weight.to(weight.dtype))
    return torch.cat(inputs, -1), torch.cat(columns, 1), bias
