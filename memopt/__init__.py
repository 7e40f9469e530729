"""memopt: train PyTorch models that do not fit in memory, without changing the training loop.

Nothing is imported before it is used, so that ``import memopt`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from memopt.deprecation import missing
from memopt.version import __version__

if TYPE_CHECKING:
    from memopt import integrations, kernels, offload, optim, planner
    from memopt.integrations import fuse_loss
    from memopt.kernels import chunked_loss, contrastive_loss, linear_cross_entropy
    from memopt.metering import meter
    from memopt.offload import apply
    from memopt.planner import plan, trace
    from memopt.wrapping import wrap

_HOMES = {
    "apply": "memopt.offload",
    "chunked_loss": "memopt.kernels",
    "contrastive_loss": "memopt.kernels",
    "fuse_loss": "memopt.integrations",
    "linear_cross_entropy": "memopt.kernels",
    "meter": "memopt.metering",
    "plan": "memopt.planner",
    "trace": "memopt.planner",
    "wrap": "memopt.wrapping",
}
_ROOMS = ("integrations", "kernels", "offload", "optim", "planner")

__all__ = [
    "__version__",
    "apply",
    "chunked_loss",
    "contrastive_loss",
    "fuse_loss",
    "integrations",
    "kernels",
    "linear_cross_entropy",
    "meter",
    "offload",
    "optim",
    "plan",
    "planner",
    "trace",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"memopt.{name}")
    else:
        return missing(__name__, name, __all__)
    globals()[name] = value  # the next look-up is a plain one, also where a submodule of that name was imported
    return value


def __dir__() -> list[str]:
    return __all__
