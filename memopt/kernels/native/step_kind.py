"""What one compiled step is made for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memopt.kernels.codecs import Codec
from memopt.kernels.update import Update

GRAD_SCALE = "grad_scale"  # see ``Update``


@dataclass(frozen=True)
class StepKind:
    """What one compiled step is made for; ``stored`` has a codec or a dtype for each state.

    ``restart``: elements with a new value that is not finite start anew, at zero; only Triton's quantisers do without.
    ``scaled``: numbers may be moved between factors (see ``computed``); only native kernels do.
    ``graded``: the scalar ``grad_scale`` is not 1; only native kernels ask.
    ``guarded``: gradients are scaled, and the step may be called off, by two numbers on the device; Triton only.
    """

    update: Update
    param: torch.dtype
    grad: torch.dtype
    stored: tuple[Codec | torch.dtype, ...]
    roundings: tuple[str, ...]
    param_rounding: str
    restart: bool = True
    scaled: bool = True
    graded: bool = False
    guarded: bool = False

    @property
    def quantised(self) -> tuple[int, ...]:
        """Numbers of the states that have a codec."""
        return tuple(j for j, s in enumerate(self.stored) if isinstance(s, Codec))

    @property
    def noisy(self) -> tuple[int, ...]:
        """Slots that need random numbers; the parameter's comes after the states'."""
        slots = [j for j, r in enumerate(self.roundings) if r == "stochastic"]
        return (*slots, *([len(self.stored)] if self.param_rounding == "stochastic" else []))
