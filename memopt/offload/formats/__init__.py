"""How a compressed storage waits for backward: one file per format, found through ``format_named``."""

from __future__ import annotations

from memopt.offload.formats.blockwise import Blockwise
from memopt.offload.formats.format import Format
from memopt.offload.formats.mask import Mask
from memopt.offload.formats.projection import Projection

__all__ = ["Format", "format_named"]

_FORMATS: dict[str, Format] = {
    "8bit": Blockwise("sq127", 256),
    "4bit": Blockwise("nf4", 64),
    "mask": Mask(),
    "projection": Projection(),
}


def format_named(name: str | None) -> Format:
    """A format by name; without one, 8-bit codes.

    Raises:
        ValueError: no such format.
    """
    if name is not None and name not in _FORMATS:
        raise ValueError(f"compression format {name!r} is unknown; choose one of {', '.join(_FORMATS)}")
    return _FORMATS[name or "8bit"]
