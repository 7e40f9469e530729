"""8-bit codes that libraries share, so that a conversion between them need not decode and round anew.

bitsandbytes, torchao and our ``8bit-dynamic`` keep the same 256 levels with one scale per 256 elements. The others'
blocks run over the flattened parameter, ours along its rows: the same blocks where a row is a whole number of blocks,
or where we lay the parameter out flat (one dimension, or rows shorter than a block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import Codec, State
from memopt.optim.conversion.plain import StateDict
from memopt.optim.layout import Extent, row_shape
from memopt.optim.optimizer import RuleOptimizer
from memopt.optim.slot import Slot

BLOCK = 256


@dataclass(frozen=True)
class Codes:
    """A state as other libraries keep it.

    Args:
        codes: uint8, of the parameter's shape.
        scales: fp32, one per 256 elements of the flattened parameter.
        levels: fp32 (256,), the value of each code at scale 1.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor


Shared = dict[Any, dict[str, Codes]]
"""Parameter key of a state dict -> name of the state -> its codes."""


def codec_of(slot: Slot, spec: State) -> Codec | None:
    """The codec of a state whose blocks are those of the flattened parameter, or None."""
    kept_by, extent = slot.kept(spec)
    codec = kept_by.codec(spec)
    if codec is None or codec.bits != 8 or codec.block != BLOCK:
        return None
    blocks = codec.blocks(row_shape(extent, BLOCK))
    return codec if blocks.flat or blocks.row_length % BLOCK == 0 else None


def shared_codes(slot: Slot) -> dict[str, Codes]:
    """The states of one of our parameters that other libraries may take as they are."""
    found = {}
    for spec in slot.specs:
        codec = codec_of(slot, spec)
        if codec is not None:
            codes, scales = (slot.held[key] for key in slot.kept(spec)[0].keys(spec))
            found[spec.name] = Codes(codes.reshape(slot.extent.shape), scales.flatten(), codec.values())
    return found


def put_codes(plain: StateDict, shared: Shared, optimizer: RuleOptimizer) -> StateDict:
    """The plain state dict with codes in the place of decoded states, where ``optimizer`` keeps the same levels."""
    state = dict(plain["state"])
    number = 0
    for group, ours in zip(plain["param_groups"], optimizer.param_groups, strict=False):
        for key, param in zip(group["params"], ours["params"], strict=False):
            slot = optimizer.slot(number, ours, param, {})
            for spec in slot.specs if key in state else ():
                codec, given = codec_of(slot, spec), shared.get(key, {}).get(spec.name)
                if codec is None or given is None or given.codes.shape != param.shape:
                    continue
                if torch.equal(codec.values(), given.levels.cpu()):
                    rows = row_shape(Extent(slot.shape, slot.shape), BLOCK)
                    names = slot.kept(spec)[0].keys(spec)
                    parts = (given.codes.reshape(rows), given.scales.reshape(codec.blocks(rows).scale_shape))
                    kept = {name: value for name, value in state[key].items() if name != spec.name}
                    state[key] = {**kept, **dict(zip(names, parts, strict=True))}
            number += 1
    return {**plain, "state": state}
