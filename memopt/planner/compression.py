"""How small the runtime's compression formats make a storage."""

from __future__ import annotations

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "bool": 1}
_CODES = ("float32", "bfloat16", "float16")

# Bits per element, scales included: one 32-bit scale for 256 codes of 8 bits, or for 64 codes of 4 bits.
_FORMATS = {
    "8bit": (8 + 32 / 256, _CODES),
    "4bit": (4 + 32 / 64, _CODES),
    "mask": (1, ("bool",)),
}


def formats_for(dtype: str) -> list[str]:
    """The formats that can hold elements of a type."""
    return [name for name, (_, dtypes) in _FORMATS.items() if dtype in dtypes]


def compressed_bytes(bytes: int, dtype: str, format: str) -> int:
    """Bytes of the copy of a storage of elements of a type."""
    return int(bytes / _ELEMENT_BYTES[dtype] * _FORMATS[format][0] / 8)
