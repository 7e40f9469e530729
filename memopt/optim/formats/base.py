"""What a state format is: which codec each state gets, what is allocated, and how the kernels see it.

A format never looks at a rule: it is told a state's name and whether it can be negative, and stores it as one plain
tensor or as codes with scales, all plain tensors, under keys that begin with the state's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from memopt.kernels import Codec, Quantized, State, dequantize_blockwise, get_codec, quantize_blockwise
from memopt.optim.layout import Extent, as_rows, row_shape

Stored = dict[str, Any]

Join = Callable[[Sequence[Tensor]], None]
"""Raises maxima over rows, in place, to those over the rows of all ranks that share the parameter."""


def alone(maxima: Sequence[Tensor]) -> None:
    """The join of a parameter that is whole here: nothing to do."""


class StateFormat(Protocol):
    """How optimizer states are kept between steps. Implement these members, put the object in a file of this folder
    as ``FORMAT`` (or pass it as ``state=``), and every rule can use it.

    Where a step makes an encoded state of an element NaN or infinite, all of that element's encoded states start anew,
    at zero, and raise no scale: its neighbours stay as they would be without it. The parameter itself, and plain
    states, are what fp32 makes of it.

    ``name`` is what ``state=`` and state dicts call it; ``block`` is the elements per scale, 0 for plain formats.

    Two more are optional: ``for_extent(extent)`` gives the format for parameters of some shape, where it is another;
    ``step``, with the arguments of :func:`memopt.kernels.step` and a ``join``, replaces it where a step needs more than
    one pass (:mod:`memopt.optim.formats.rank_one`).
    """

    @property
    def name(self) -> str:
        """What ``state=`` and state dicts call it."""

    @property
    def block(self) -> int:
        """Elements that share a scale, 0 for plain formats."""

    def codec(self, spec: State) -> Codec | None:
        """The codec of this state; None where it is a plain tensor."""

    def rounding(self, spec: State) -> str:
        """How new values of the state are rounded, ``"nearest"`` or ``"stochastic"``."""

    def keys(self, spec: State) -> tuple[str, ...]:
        """The names of the tensors that hold this state in ``optimizer.state[p]``."""

    def allocate(self, spec: State, param: Tensor, extent: Extent) -> Stored:
        """Fresh tensors, all zero in value, for the part of the parameter held here."""

    def operand(self, spec: State, stored: Mapping[str, Any], extent: Extent) -> Tensor | Quantized:
        """The same tensors as the kernels take them; no copy."""

    def encode(self, spec: State, value: Tensor, extent: Extent, join: Join = alone) -> Stored:
        """A plain tensor of the local shape put in this format, rounded to nearest. ``join`` is for scales that depend
        on all rows of a sharded parameter."""

    def decode(self, spec: State, stored: Mapping[str, Any], extent: Extent) -> Tensor:
        """The state as a new fp32 tensor of the local shape."""


@dataclass(frozen=True)
class Plain:
    """States as ordinary tensors of one float type, in the parameter's shape and memory layout.

    Signed states round to nearest. Unsigned ones round stochastically below fp32: a second moment moves by a
    thousandth a step, less than half a bf16 spacing, and rounding to nearest would freeze it.
    """

    name: str
    dtype: torch.dtype
    block: int = 0

    def codec(self, spec: State) -> Codec | None:
        return None

    def rounding(self, spec: State) -> str:
        return "nearest" if spec.signed or self.dtype == torch.float32 else "stochastic"

    def keys(self, spec: State) -> tuple[str, ...]:
        return (spec.name,)

    def allocate(self, spec: State, param: Tensor, extent: Extent) -> Stored:
        return {spec.name: torch.zeros_like(param, dtype=self.dtype, memory_format=torch.preserve_format)}

    def operand(self, spec: State, stored: Mapping[str, Any], extent: Extent) -> Tensor | Quantized:
        return cast(Tensor, stored[spec.name])

    def encode(self, spec: State, value: Tensor, extent: Extent, join: Join = alone) -> Stored:
        return {spec.name: value.detach().to(self.dtype, copy=True)}

    def decode(self, spec: State, stored: Mapping[str, Any], extent: Extent) -> Tensor:
        return cast(Tensor, stored[spec.name]).to(torch.float32, copy=True)


@dataclass(frozen=True)
class Blockwise:
    """States as codes with one fp32 scale per block of a row.

    Args:
        name: what ``state=`` calls it.
        signed: the codec of states that can be negative.
        unsigned: the codec of states that cannot.
        block: elements per scale.
    """

    name: str
    signed: str
    unsigned: str
    block: int

    def codec(self, spec: State) -> Codec:
        return get_codec(self.signed if spec.signed else self.unsigned).with_block(self.block)

    def rounding(self, spec: State) -> str:
        return self.codec(spec).rounding

    def keys(self, spec: State) -> tuple[str, ...]:
        return (f"{spec.name}_codes", f"{spec.name}_scales")

    def _stored(self, spec: State, packed: Quantized) -> Stored:
        return dict(zip(self.keys(spec), (packed.codes, packed.scales), strict=True))

    def allocate(self, spec: State, param: Tensor, extent: Extent) -> Stored:
        return self._stored(spec, Quantized.zeros(row_shape(extent, self.block), self.codec(spec), param.device))

    def operand(self, spec: State, stored: Mapping[str, Any], extent: Extent) -> Quantized:
        codes, scales = (stored[key] for key in self.keys(spec))
        return Quantized(codes, scales, row_shape(extent, self.block), self.codec(spec))

    def encode(self, spec: State, value: Tensor, extent: Extent, join: Join = alone) -> Stored:
        rows = as_rows(value.detach().float(), extent, self.block)
        return self._stored(spec, quantize_blockwise(rows, self.codec(spec)))

    def decode(self, spec: State, stored: Mapping[str, Any], extent: Extent) -> Tensor:
        return dequantize_blockwise(self.operand(spec, stored, extent)).reshape(extent.local)
