"""Finds the attention modules of a model, and which of their layers make queries, keys, values and outputs.

An attention module is ``nn.MultiheadAttention``, or any module that has linear layers of its own and says, in its own
attributes, how many heads it has or how large one is (a count may also stand in its ``config``; grouped-query attention
says how many key heads, too). Its layers are told apart by their sizes. Queries, keys and values of equal size are
told apart by the first letter that matters of their names where that gives exactly one of each, else by their order.
A layer that adapters are wrapped around, as PEFT's are, counts with all that the wrapper holds. Where queries, keys or
values are, by name, the work of a module not known to be linear, nothing is said of the attention module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")
_WIDTHS = ("embed_dim", "hidden_size", "n_embd", "dim", "d_model")
_LETTER = re.compile(r"(?:^|_|^w)([qkv])(?:$|_|uery|ey|alue|ut|proj)")
_WRAPPED = ("base_layer", "original_module")  # PEFT's names: of what adapters adapt, of what a trained copy replaces


@dataclass(frozen=True)
class Layer:
    """A linear map: a module with a matrix ``weight``, (outputs, inputs) or, as GPT-2 has them, (inputs, outputs); or
    what is wrapped around one."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int

    @property
    def by_rows(self) -> list[nn.Linear]:
        """The module, or its like within a wrapper, if a row of the weight makes one output."""
        linear = [module for module in self.module.modules() if isinstance(module, nn.Linear)]
        return [one for one in linear if (one.in_features, one.out_features) == (self.inputs, self.outputs)]


@dataclass(frozen=True)
class Attention:
    """Parameters of one attention module by what they make; ``fused`` ones make queries, keys and values together.

    ``name`` is the module's in the model, ``head`` the elements of one head. ``heads_by_row`` are those of the query,
    key and fused parameters whose first dimension counts heads, adapters excepted.
    """

    name: str
    head: int
    query_key: tuple[Tensor, ...]
    value_output: tuple[Tensor, ...]
    fused: tuple[Tensor, ...]
    heads_by_row: tuple[Tensor, ...]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that others are wrapped around; the module itself where there are none."""
    inner = next((one for name in _WRAPPED if isinstance(one := getattr(module, name, None), nn.Module)), None)
    return module if inner is None else unwrapped(inner)


def linear_layer(name: str, module: nn.Module) -> Layer | None:
    """The module as a linear map, or None where it is none."""
    inner = unwrapped(module)
    if isinstance(inner, nn.Linear):
        return Layer(name, module, inner.in_features, inner.out_features)
    weight, outputs = getattr(inner, "weight", None), getattr(inner, "nf", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and outputs == weight.shape[1]:  # transformers' Conv1D
        return Layer(name, module, weight.shape[0], weight.shape[1])
    return None


def attentions(model: nn.Module) -> Iterator[Attention]:
    """Every attention module of the model, in the order of its modules."""
    layers = [layer for name, one in model.named_modules() if (layer := linear_layer(name, one)) is not None]
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield _multihead(name.removesuffix(f".{_WRAPPED[0]}"), module)
            continue
        own = [layer for key, child in module.named_children() if (layer := linear_layer(key, child)) is not None]
        sizes = _sizes(module, own[0].inputs) if own else None
        if sizes is not None:
            found = _parted(name, own, *sizes, hidden=_hidden(module, own), following=_after(name, layers))
            if found is not None:
                yield found


def _multihead(name: str, module: nn.MultiheadAttention) -> Attention:
    fused = [p for p in (module.in_proj_weight, module.in_proj_bias) if p is not None]
    query_key: list[Tensor] = [p for p in (module.q_proj_weight, module.k_proj_weight) if p is not None]
    values = [p for p in (module.v_proj_weight, module.bias_v, *module.out_proj.parameters()) if p is not None]
    if module.bias_k is not None:
        query_key.append(module.bias_k)
    by_row = (*fused, *(p for p in query_key if p is not module.bias_k))
    return Attention(name, module.embed_dim // module.num_heads, tuple(query_key), tuple(values), tuple(fused), by_row)


def _whole(module: nn.Module, names: tuple[str, ...], *, configured: bool = True) -> int | None:
    """The first of these attributes that is a positive int, on the module or on its ``config``."""
    for owner in (module, getattr(module, "config", None) if configured else None):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _sizes(module: nn.Module, width: int) -> tuple[int, int, int] | None:
    """(query heads, key heads, head size) of an attention module, or None where it says nothing of heads itself."""
    if _whole(module, (*_HEADS, *_HEAD_SIZES), configured=False) is None:
        return None
    heads, head = _whole(module, _HEADS), _whole(module, _HEAD_SIZES)
    total = _whole(module, _WIDTHS) or width
    if heads is None and head is not None:
        heads = total // head
    if heads is None or (head is None and total % heads):
        return None
    return heads, _whole(module, _KEY_HEADS) or heads, head or total // heads


def _hidden(module: nn.Module, own: list[Layer]) -> bool:
    """Whether queries, keys or values are, by name, the work of a module with matrices that is not known as linear."""
    linear = {one.name for one in own}
    others = [
        name for name, child in module.named_children()
        if name not in linear and any(p.dim() > 1 for p in child.parameters())
    ]  # fmt: skip
    return not set(map(_letter, others)) <= {None, *map(_letter, linear)}


def _letter(name: str) -> str | None:
    found = _LETTER.search(name.lower())
    return found[1] if found else None


def _after(name: str, layers: list[Layer]) -> Layer | None:
    """The first linear layer of the model after the module of that name."""
    inside = [i for i, layer in enumerate(layers) if layer.name.startswith(f"{name}.")]
    return layers[inside[-1] + 1] if inside and inside[-1] + 1 < len(layers) else None


def _parted(
    name: str, own: list[Layer], heads: int, key_heads: int, head: int, *, hidden: bool, following: Layer | None
) -> Attention | None:
    fused = [one for one in own if one.outputs == (heads + 2 * key_heads) * head][:1]
    query_key: list[Layer] = []
    values: list[Layer] = []
    if not fused:
        made = None if hidden else _queries_keys_values(own, heads * head, key_heads * head)
        if made is None:
            return None
        query_key, values = [made[0], made[1]], [made[2]] if made[2] is not None else []
    outputs = [one for one in own if one.inputs == heads * head and one not in (*fused, *query_key, *values)][:1]
    if not outputs and following is not None and following.inputs == heads * head:
        outputs = [following]  # as in BERT, whose output layer is a module of its own
    return Attention(
        name,
        head,
        _parameters(query_key),
        _parameters([*values, *outputs]),
        _parameters(fused),
        tuple(p for one in (*fused, *query_key) for module in one.by_rows for p in module.parameters()),
    )


def _queries_keys_values(own: list[Layer], width: int, key_width: int) -> tuple[Layer, Layer, Layer | None] | None:
    named: dict[str, list[Layer]] = {"q": [], "k": [], "v": []}
    for one in own:
        letter = _letter(one.name)
        if letter and one.outputs == (width if letter == "q" else key_width):
            named[letter].append(one)
    if all(len(found) == 1 for found in named.values()):
        return named["q"][0], named["k"][0], named["v"][0]
    queries = [one for one in own if one.outputs == width][:1]
    keys = [one for one in own if one.outputs == key_width and one not in queries]
    if not queries or not keys:
        return None
    return queries[0], keys[0], keys[1] if len(keys) > 1 else None


def _parameters(layers: list[Layer]) -> tuple[Tensor, ...]:
    return tuple(p for layer in layers for p in layer.module.parameters())


def query_and_key_weights(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Each weight (and bias) that makes queries or keys in rows, with the rows of one head.

    A single layer that makes queries, keys and values is taken by heads as a whole.
    """
    for one in attentions(model):
        for parameter in one.heads_by_row:
            yield parameter, one.head
