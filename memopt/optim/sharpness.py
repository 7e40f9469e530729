"""Learning rates by kind of block: Wang et al., "The Sharpness Disparity Principle in Transformers for Accelerating
Language Model Pre-Training" (2025).

The paper measures that the loss is flattest along embeddings and sharpest along norms, from early in training on:
embedding << query-key < feed-forward < value-output << norm. A learning rate that norms just bear is then too small for
the rest; each kind gets a multiple of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from memopt.optim import checks
from memopt.optim.attention import Attention, attentions, linear_layer

RATIOS: Mapping[str, float] = {
    "embedding": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0, "qkv": 4.0, "norm": 1.0, "other": 1.0,
}  # fmt: skip
"""Learning rates over that of norms: the paper's tuned configuration (section 5). Two kinds are ours: ``"qkv"``, one
parameter that makes queries, keys and values, goes by its sharpest part; ``"other"`` (an output layer with weights of
its own, positions held as a bare parameter, whatever is outside the transformer's layers) keeps the base rate."""

_LISTS = (nn.ModuleList, nn.Sequential)


def block_kinds(model: nn.Module) -> dict[str, str]:
    """The kind of every parameter of a model by its name, from module structure and shapes.

    - embedding: what an ``nn.Embedding`` holds; an output layer tied to it too;
    - qk, vo, qkv: layers of attention modules (:mod:`memopt.optim.attention`) and their biases;
    - norm: modules without children whose parameters all have one dimension;
    - ffn: the other linear layers and matrices of the smallest module that holds an attention module and any of them;
    - other: the rest.
    """
    kinds: dict[int, str] = {}
    found = list(attentions(model))
    for module in model.modules():
        held = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            _take(kinds, held, "embedding")
        elif not any(module.children()) and linear_layer("", module) is None and all(p.dim() == 1 for p in held):
            _take(kinds, held, "norm")
    for one in found:
        _take(kinds, one.query_key, "qk")
        _take(kinds, one.value_output, "vo")
        _take(kinds, one.fused, "qkv")
    for layer in _layers_around(model, found, kinds):
        for module in layer.modules():
            held = list(module.parameters(recurse=False))
            linear = linear_layer("", module) is not None
            _take(kinds, [p for p in held if linear or p.dim() > 1], "ffn")
    return {name: kinds.get(id(p), "other") for name, p in model.named_parameters()}


def _take(kinds: dict[int, str], params: Iterable[Tensor], kind: str) -> None:
    for p in params:
        kinds.setdefault(id(p), kind)


def _layers_around(model: nn.Module, found: list[Attention], kinds: Mapping[int, str]) -> list[nn.Module]:
    """For every attention module, the smallest module around it with matrices of no kind yet; a list is no layer."""
    layers = []
    for one in found:
        parts = one.name.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            module = model.get_submodule(".".join(parts[:depth]))
            if isinstance(module, _LISTS):
                break
            if any(p.dim() > 1 and id(p) not in kinds for p in module.parameters()):
                layers.append(module)
                break
    return layers


def blockwise_lr(
    model: nn.Module,
    lr: float | Tensor,
    *,
    ratios: Mapping[str, float] | None = None,
    kinds: Mapping[str, str] | None = None,
    groups: Iterable[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, each kind of block with ``ratio * lr``.

    Args:
        model: its parameters that require gradients are taken.
        lr: the learning rate of norms: what a run with one rate for all would use.
        ratios: kind -> multiple of ``lr``, over those of :data:`RATIOS`; more kinds may be added.
        kinds: name of a parameter or module -> kind, for what :func:`block_kinds` cannot know.
        groups: groups with other options of their own (weight decay, ``rows_per_block`` of Adam-mini); each is cut by
            kind and keeps its options.

    Returns:
        Groups of ``(name, parameter)`` pairs with their ``lr``; a scheduler scales them all alike. No state is added.

    Raises:
        ValueError: no attention module was found and ``kinds`` is not given; a name or a kind that does not exist; a
            parameter of ``groups`` that is not the model's.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
        >>> [(group["lr"], len(group["params"])) for group in blockwise_lr(layer, 1.0)]
        [(4.0, 2), (4.0, 2), (6.0, 4), (1.0, 4)]
    """
    ratios = {**RATIOS, **(ratios or {})}
    for kind in ratios:
        checks.positive(ratios, kind)
    named = dict(model.named_parameters())
    found = block_kinds(model)
    if kinds is None and not {"qk", "qkv"} & set(found.values()):
        raise ValueError(
            "blockwise_lr found no attention module in the model, so the paper's kinds of blocks do not apply; "
            "name its parts with kinds={'module or parameter': 'qk', ...}"
        )
    for item, kind in (kinds or {}).items():
        names = [name for name in named if name == item or name.startswith(f"{item}.")]
        if not names:
            raise ValueError(f"kinds names {item!r}, but no parameter or module with parameters is called so")
        if kind not in ratios:
            raise ValueError(f"kinds gives {item!r} the kind {kind!r}; the kinds are {', '.join(ratios)}")
        found.update(dict.fromkeys(names, kind))
    names_of = {id(p): name for name, p in named.items()}
    result: dict[tuple[int, str], dict[str, Any]] = {}
    for number, group in enumerate(groups if groups is not None else [{"params": named.items()}]):
        for item in group["params"]:
            param = item[1] if isinstance(item, tuple) else item
            if id(param) not in names_of:
                raise ValueError(
                    f"groups[{number}] holds a parameter of shape {tuple(param.shape)} that is not the model's"
                )
            if param.requires_grad:
                name = names_of[id(param)]
                fresh = {**group, "params": [], "lr": lr * ratios[found[name]]}
                result.setdefault((number, found[name]), fresh)["params"].append((name, param))
    return list(result.values())
