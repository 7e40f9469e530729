"""A vocabulary loss made ready for its passes: which rows count, in which dtype sums are kept, what each row weighs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memopt.kernels.losses.settings import Settings
from memopt.kernels.losses.vocab_parallel import Shard


@dataclass
class Problem:
    """Letters: N rows of ``hidden``, M of them counted, H features, V vocabulary entries held here, P positions.

    hidden: (N, H) and weight: (V, H), one dtype; everything below in ``opmath`` (float32, or float64 for float64).
    bias, class_weight: (V,); scale: scalar.
    index: (M,) rows of ``hidden`` that count, None for all of them in order; positions: the same among the P
        positions of the output.
    target: (M,) entry of this shard, outside [0, V) where another rank holds it; soft: (P, V) as the user gave it.
    share: (M,) class weight of each row's target, None for ones.
    uniform: label smoothing divided by the vocabulary of all ranks; weight_sum: sum of class weights of all ranks.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    class_weight: Tensor | None
    index: Tensor | None
    positions: Tensor | None
    target: Tensor | None
    soft: Tensor | None
    share: Tensor | None
    uniform: float
    weight_sum: Tensor | float
    position_count: int
    shard: Shard
    settings: Settings

    @property
    def rows(self) -> int:
        return self.position_count if self.positions is None else int(self.positions.shape[0])

    @property
    def opmath(self) -> torch.dtype:
        return self.scale.dtype

    def hidden_rows(self, first: int, stop: int) -> Tensor:
        """The counted rows ``first`` to ``stop`` of ``hidden``: a view where all rows count, else a copy."""
        return self.hidden[first:stop] if self.index is None else self.hidden.index_select(0, self.index[first:stop])

    def soft_rows(self, first: int, stop: int, entries: slice = slice(None)) -> Tensor | None:
        """Target probabilities of these rows, smoothed, in ``opmath``; None for hard targets."""
        if self.soft is None:
            return None
        smoothing = self.settings.label_smoothing
        chunk = self.soft[first:stop] if self.positions is None else self.soft[self.positions[first:stop]]
        chunk = chunk[:, entries].to(self.opmath)
        return chunk if not smoothing else chunk * (1 - smoothing) + self.uniform

    def target_rows(self, first: int, stop: int) -> Tensor | None:
        return None if self.target is None else self.target[first:stop]

    def denominator(self) -> Tensor:
        """What ``reduction="mean"`` divides the cross-entropy by: the sum of ``share``, or the number of rows."""
        if self.share is not None:
            return self.share.sum()
        return torch.full((), float(self.rows), dtype=self.opmath, device=self.hidden.device)

    def spread(self, rows: Tensor) -> Tensor:
        """(M,) values of the counted rows to all P positions, zero elsewhere."""
        if self.positions is None:
            return rows
        return rows.new_zeros(self.position_count).index_copy_(0, self.positions, rows)

    def collect(self, positions: Tensor) -> Tensor:
        """The reverse of :meth:`spread`: (P,) values to the M counted rows, in ``opmath``."""
        flat = positions.reshape(-1).to(self.opmath)
        return flat if self.positions is None else flat.index_select(0, self.positions)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    settings: Settings,
) -> Problem:
    """Flat inputs, as ``linear_ce`` checked them, to a :class:`Problem`.

    ``target`` is (N,) int64 or (N, V) probabilities. A target outside the vocabulary is an error on a CPU; on other
    devices it is not looked for, because that would stop the device, and such a row counts with target logit zero.
    Under fake tensors no value can be known: every row counts, which is the most memory a real call can take.
    """
    N, V = hidden.shape[0], weight.shape[0]
    opmath = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shard = Shard.of(settings.group, V, hidden.device)
    length, shift = settings.length, settings.shift
    kept = length - shift
    sequences = N // length if length else 0
    count = sequences * kept
    soft = hard = index = positions = share = None
    if target.is_floating_point():
        soft = target.reshape(sequences, length, V)[:, shift:].reshape(count, V)
    else:
        hard = target.reshape(sequences, length)[:, shift:].reshape(count)
        positions = _counted(hard, settings.ignore_index)
        if positions is not None:
            hard = hard.index_select(0, positions)
    if shift:
        flat = torch.arange(count, device=hidden.device) if positions is None else positions
        index = flat + torch.div(flat, max(kept, 1), rounding_mode="floor") * shift
    else:
        index = positions
    weights = None if class_weight is None else class_weight.to(opmath)
    if hard is not None:
        _check_range(hard, shard, settings.ignore_index)
        hard = hard - shard.first if shard.first else hard
        if weights is not None:
            share = shard.sum_(torch.where((hard >= 0) & (hard < V), weights[hard.clamp(0, V - 1)], 0.0))
    weight_sum = float(shard.total) if weights is None else shard.sum_(weights.sum())
    return Problem(
        hidden=hidden,
        weight=weight,
        bias=None if bias is None else bias.to(opmath),
        scale=torch.ones((), dtype=opmath, device=hidden.device) if scale is None else scale.to(opmath),
        class_weight=weights,
        index=index,
        positions=positions,
        target=hard,
        soft=soft,
        share=share,
        uniform=settings.label_smoothing / shard.total,
        weight_sum=weight_sum,
        position_count=count,
        shard=shard,
        settings=settings,
    )


def _counted(target: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that are not ignored; None where all count."""
    if values_unknown(target):
        return None
    counted = target != ignore_index
    return None if bool(counted.all()) else counted.nonzero().squeeze(1)


def _check_range(target: Tensor, shard: Shard, ignore_index: int) -> None:
    if target.device.type != "cpu" or target.numel() == 0 or values_unknown(target):
        return
    low, high = (int(value) for value in target.aminmax())
    if low < 0 or high >= shard.total:
        wrong = low if low < 0 else high
        raise ValueError(
            f"target holds {wrong}, which is outside the vocabulary of {shard.total} entries; "
            f"expected 0 to {shard.total - 1}, or ignore_index={ignore_index} for positions that do not count"
        )


def values_unknown(tensor: Tensor) -> bool:
    """Whether the tensor has a shape but no values: fake or on the meta device."""
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)
