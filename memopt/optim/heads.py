"""Finds which weights of a model make queries and keys, and their head size, from its modules and shapes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
_WIDTHS = ("embed_dim", "hidden_size", "n_embd", "dim", "d_model")


def _whole(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a positive int, on the module or on its ``config``."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _sizes(module: nn.Module, width: int) -> tuple[int, int, int] | None:
    """(query heads, key heads, head size) of an attention module, or None where it does not say."""
    heads = _whole(module, _HEADS)
    if heads is None:
        return None
    head = _whole(module, ("head_dim", "head_size"))
    if head is None:
        total = _whole(module, _WIDTHS) or width
        if total % heads:
            return None
        head = total // heads
    return heads, _whole(module, _KEY_HEADS) or heads, head


def query_and_key_weights(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Each weight (and bias) that makes queries or keys, with the rows of one head.

    An attention module is ``nn.MultiheadAttention``, or any module that has linear layers of its own and says how many
    heads it has (on itself or its ``config``; grouped-query attention also says how many key heads, and ``head_dim``
    counts where it is given). Its first linear layer with as many outputs as all query heads makes queries and the
    next with as many as all key heads makes keys, in the order they were registered. A single layer that makes
    queries, keys and values is taken by heads as a whole.
    """
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            head = module.embed_dim // module.num_heads
            for weight in (module.in_proj_weight, module.in_proj_bias, module.q_proj_weight, module.k_proj_weight):
                if weight is not None:
                    yield weight, head
            continue
        layers = [child for child in module.children() if isinstance(child, nn.Linear)]
        sizes = _sizes(module, layers[0].in_features) if layers else None
        if sizes is None:
            continue
        heads, key_heads, head = sizes
        fused = [one for one in layers if one.out_features == (heads + 2 * key_heads) * head]
        queries = [one for one in layers if one.out_features == heads * head]
        keys = [one for one in layers if one.out_features == key_heads * head and one not in queries[:1]]
        for layer in fused[:1] or (*queries[:1], *keys[:1]):
            yield layer.weight, head
            if layer.bias is not None:
                yield layer.bias, head
