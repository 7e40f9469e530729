"""What coverages are made over: an optimizer's class or name, and the parameters of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _ByName:
    """Makes the optimizer of a name, looked up when called."""

    name: str

    def __call__(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        from memopt.optim.registry import make

        return make(self.name, params, **options)


def base_factory(base: Any) -> Callable[..., torch.optim.Optimizer]:
    """What makes an optimizer from parameters and options: the class itself, or a name looked up when called."""
    if isinstance(base, str):
        return _ByName(base)
    wrong = isinstance(base, type) and not issubclass(base, torch.optim.Optimizer)
    if wrong or isinstance(base, torch.optim.Optimizer) or not callable(base):
        found = f"an {type(base).__name__}, made already" if isinstance(base, torch.optim.Optimizer) else repr(base)
        raise TypeError(f"base is {found}; it must be an optimizer class such as memopt.optim.AdamW8bit, or its name")
    return cast("Callable[..., torch.optim.Optimizer]", base)


def trainable(model: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor], nn.Module | None]:
    """Parameter groups, names and, where one was given, the module."""
    if isinstance(model, nn.Module):
        named: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the model has no parameter that requires gradients; nothing can be trained")
        return [{"params": list(named.values())}], named, model
    items = [] if isinstance(model, Tensor | str) or not isinstance(model, Iterable) else list(model)
    if not all(isinstance(item, Tensor | tuple | Mapping) for item in items) or (not items and model != []):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a module, a list of parameters, or parameter groups"
        )
    groups = [dict(item) for item in items] if items and isinstance(items[0], Mapping) else [{"params": items}]
    named = {}
    for group in groups:
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        params = [p if isinstance(p, tuple) else (str(len(named) + i), p) for i, p in enumerate(params)]
        kept = [(name, p) for name, p in params if p.requires_grad]
        named.update(kept)
        group["params"] = [p for _, p in kept]
    if not named:
        raise ValueError("model holds no parameter that requires gradients; nothing can be trained")
    return [group for group in groups if group["params"]], named, None
