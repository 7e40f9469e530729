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
from memopt.optim.attention import Attention, attentions, linear_layer, unwrapped

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
    - qk, vo, qkv: layers of attention modules (:mod:`memopt.optim.attention`) and their biases; qkv too where it is not
      known what a linear layer inside one makes, as of multi-head latent attention;
    - norm: modules without children whose parameters all have one dimension;
    - ffn: the other linear layers and matrices of the smallest module that holds an attention module and any of them;
    - other: the rest, tables of positions inside an attention module among them.

    Adapters wrapped around a layer (PEFT) are of its kind.
    """
    kinds: dict[int, str] = {}
    found = list(attentions(model))
    inside = [module for one in found for module in model.get_submodule(one.name).modules()]
    for module in inside:
        if isinstance(unwrapped(module), nn.Embedding):
            _take(kinds, module.parameters(), "other")
    linear = {id(p) for module in model.modules() if linear_layer("", module) is not None for p in module.parameters()}
    for module in model.modules():
        held = list(module.parameters(recurse=False))
        if isinstance(unwrapped(module), nn.Embedding | nn.EmbeddingBag):
            _take(kinds, module.parameters(), "embedding")
        elif not any(module.children()) and all(p.dim() == 1 and id(p) not in linear for p in held):
            _take(kinds, held, "norm")
    for one in found:
        _take(kinds, one.query_key, "qk")
        _take(kinds, one.value_output, "vo")
        _take(kinds, one.fused, "qkv")
    for module in inside:
        held = list(module.parameters(recurse=False))
        _take(kinds, [p for p in held if id(p) in linear], "qkv")
        _take(kinds, held, "other")
    for layer in _layers_around(model, found, kinds):
        _take(kinds, [p for p in layer.parameters() if id(p) in linear or p.dim() > 1], "ffn")
    return {name: kinds.get(id(p), "other") for name, p in model.named_parameters()}


def _take(kinds: dict[int, str], params: Iterable[Tensor], kind: str) -> None:
    for p in params:
        kinds.setdefault(id(p), kind)


def _layers_around(model: nn.Module, found: list[Attention], kinds: Mapping[int, str]) -> list[nn.Module]:
    """For every attention module, the smallest module around it with matrices of no kind yet; a stack is no layer."""
    homes = [one.name for one in found]
    layers = []
    for one in found:
        parts = one.name.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            name = ".".join(parts[:depth])
            module = model.get_submodule(name)
            if isinstance(module, _LISTS) and _is_stack(name, module, homes):
                break
            if any(p.dim() > 1 and id(p) not in kinds for p in module.parameters()):
                layers.append(module)
                break
    return layers


def _is_stack(name: str, members: nn.Module, homes: list[str]) -> bool:
    """Whether a list holds layers, two of one class with attention each, and not the parts of one, as T5's do."""
    prefix = f"{name}." if name else ""
    with_attention = [
        type(member) for key, member in members.named_children()
        if any(f"{home}.".startswith(f"{prefix}{key}.") for home in homes)
    ]  # fmt: skip
    return len(set(with_attention)) < len(with_attention)


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
        model: its parameters that require gradients are taken, each once however many modules share it.
        lr: the learning rate of norms: what a run with one rate for all would use.
        ratios: kind -> multiple of ``lr``, over those of :data:`RATIOS`; more kinds may be added.
        kinds: name of a parameter or module -> kind, for what :func:`block_kinds` cannot know.
        groups: groups with other options of their own (weight decay, ``rows_per_block`` of Adam-mini); each is cut by
            kind and keeps its options; one with a learning rate of its own gets multiples of that. What they leave out
            is left out.

    Returns:
        Groups of ``(name, parameter)`` pairs with their ``lr``; a scheduler scales them all alike. No state is added.

    Raises:
        ValueError: no attention module was found and ``kinds`` is not given; a name or a kind that does not exist; a
            parameter of ``groups`` that is not the model's, or in them twice; nothing requires gradients.
        TypeError: ``model`` is no module, or ``groups`` holds something else than groups.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
        >>> [(group["lr"], len(group["params"])) for group in blockwise_lr(layer, 1.0)]
        [(4.0, 2), (4.0, 2), (6.0, 4), (1.0, 4)]
    """
    ratios = {**RATIOS, **(ratios or {})}
    for kind in ratios:
        checks.positive(ratios, kind)
    checks.non_negative({"lr": lr}, "lr")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a module, whose structure tells the kinds")
    named = dict(model.named_parameters())
    if not any(p.requires_grad for p in named.values()):
        raise ValueError("the model has no parameter that requires gradients; nothing can be trained")
    aliases = dict(model.named_parameters(remove_duplicate=False))
    names_of = {id(p): name for name, p in named.items()}
    found = block_kinds(model)
    if kinds is None and not {"qk", "qkv"} & set(found.values()):
        raise ValueError(
            "blockwise_lr found no attention module in the model, so the paper's kinds of blocks do not apply; "
            "name its parts with kinds={'module or parameter': 'qk', ...}"
        )
    for item, kind in (kinds or {}).items():
        names = [names_of[id(p)] for name, p in aliases.items() if name == item or name.startswith(f"{item}.")]
        if not names:
            raise ValueError(f"kinds names {item!r}, but no parameter or module with parameters is called so")
        if kind not in ratios:
            raise ValueError(f"kinds gives {item!r} the kind {kind!r}; the kinds are {', '.join(ratios)}")
        found.update(dict.fromkeys(names, kind))
    result: dict[tuple[int, str], dict[str, Any]] = {}
    seen: set[int] = set()
    for number, group in enumerate(groups if groups is not None else [{"params": named.items()}]):
        for param in _params_of(group, number):
            shape = tuple(param.shape)
            if id(param) not in names_of:
                raise ValueError(f"groups[{number}] holds a parameter of shape {shape} that is not the model's")
            name = names_of[id(param)]
            if id(param) in seen:
                raise ValueError(f"groups[{number}] holds {name!r} of shape {shape} again; list each parameter once")
            seen.add(id(param))
            if param.requires_grad:
                fresh = {**group, "params": [], "lr": group.get("lr", lr) * ratios[found[name]]}
                result.setdefault((number, found[name]), fresh)["params"].append((name, param))
    return list(result.values())


def _params_of(group: Any, number: int) -> list[Tensor]:
    """The parameters of a group as torch's optimizers take them."""
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(f"groups[{number}] is a {type(group).__name__}; it must be a dict with 'params'")
    items = checks.ordered(group["params"])
    return [item[1] if isinstance(item, tuple) else item for item in items]
