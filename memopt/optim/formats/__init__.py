"""State formats by name: every file here that defines ``FORMAT``, and any object registered at run time."""

from __future__ import annotations

from memopt.optim.formats.base import Blockwise, Plain, StateFormat
from memopt.optim.formats.registry import get_format, names, register

__all__ = ["Blockwise", "Plain", "StateFormat", "get_format", "names", "register"]
