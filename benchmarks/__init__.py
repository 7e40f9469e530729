"""Measurements, each run as ``python -m benchmarks.NAME``."""

import sys

# From the checkout's root the link ``kernels`` would pass for the package of that name, which transformers and
# bitsandbytes import where they find it: nothing of that name is there.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
