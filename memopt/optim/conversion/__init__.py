"""Optimizer states from and to other libraries. Each library is one file here that defines ``LIBRARY``."""

from __future__ import annotations

from memopt.optim.conversion.converting import convert, libraries
from memopt.optim.conversion.plain import Library

__all__ = ["Library", "convert", "libraries"]
