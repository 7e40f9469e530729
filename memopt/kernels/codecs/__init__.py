"""How a block of values becomes codes and one scale: one file per family, found through the registry."""

from __future__ import annotations

import importlib
import pkgutil

from memopt.kernels.codecs.base import Codec, codec_names, get_codec, is_registered, register_codec

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Codec", "codec_names", "get_codec", "is_registered", "register_codec"]
