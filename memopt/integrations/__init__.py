"""Where memopt meets other libraries; nothing of them is imported before it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memopt.integrations.fused_head import FusedLoss, fuse_loss
    from memopt.integrations.hf_trainer import equip

_HOMES = {
    "FusedLoss": "fused_head",
    "equip": "hf_trainer",
    "fuse_loss": "fused_head",
}
_MODULES = ("checkpoints", "hf_trainer", "lightning")

__all__ = ["FusedLoss", "equip", "fuse_loss"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"memopt.integrations.{name}")
    if name not in _HOMES:
        raise AttributeError(
            f"module 'memopt.integrations' has no attribute {name!r}; it offers {', '.join([*__all__, *_MODULES])}"
        )
    return getattr(importlib.import_module(f"memopt.integrations.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
