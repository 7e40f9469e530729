"""Keeps libraries from taking another path because their tensors are fake.

transformers asks whether it is being traced and then builds attention masks that a real run never builds. The planner
wants to see the real run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def eager_paths() -> Iterator[None]:
    """Inside, libraries that are loaded take fake tensors for real ones."""
    module: Any = sys.modules.get("transformers.utils.import_utils")
    asked = getattr(module, "is_fake_tensor", None)
    if asked is None:
        yield
        return
    module.is_fake_tensor = lambda tensor: False
    try:
        yield
    finally:
        module.is_fake_tensor = asked


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Inside, fake tensors do not log an operation that fails; the trace reports it itself or goes on."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
