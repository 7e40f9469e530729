"""State formats by name: every file here that defines ``FORMAT``, and any object registered at run time."""

from __future__ import annotations

from memopt.optim.formats.base import Blockwise, Plain, StateFormat
from memopt.optim.formats.registry import format_for, get_format, names, register

__all__ = ["Blockwise", "Plain", "StateFormat", "format_for", "get_format", "names", "register"]
