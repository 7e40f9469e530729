"""The vocabulary loss in tiles that never leave the chip: the passes of mode "tiles", launched with Triton."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memopt.kernels.backend import choose_backend, interpreting
from memopt.kernels.losses.coefficients import Upstream, lse_coefficient, row_coefficients
from memopt.kernels.losses.problem import Problem, values_unknown
from memopt.kernels.losses.row_pass import Gradients, RowResult, Wanted, reduce_rows
from memopt.kernels.losses.settings import even_chunks

# Rows or entries of a tile, and features at a time. The interpreter pays per program and operation, so it takes few.
STATISTICS_TILE = {"BM": 128, "BV": 64, "BH": 32, "num_warps": 8, "num_stages": 3}
GRADIENT_TILE = {"BO": 64, "BT": 32, "BH": 64, "num_warps": 8, "num_stages": 2}
_PROGRAMS = 256  # about what fills a large GPU; fewer blocks of rows than this are split over the vocabulary


def check_tiles(hidden: Tensor, target: Tensor) -> None:
    """ValueError where mode "tiles" cannot run."""
    if choose_backend(hidden.device) != "triton" and not values_unknown(hidden):
        raise ValueError(
            f"mode='tiles' needs Triton and a GPU, got tensors on {hidden.device}; use 'rows' or 'recompute'"
        )
    if hidden.dtype == torch.float64:
        raise ValueError(
            "mode='tiles' takes float32, bfloat16 and float16, got torch.float64; use 'rows' or 'recompute'"
        )
    if target.is_floating_point():
        raise ValueError("mode='tiles' takes int64 targets; use 'rows' or 'recompute' for target probabilities")


def tile_statistics(problem: Problem) -> RowResult:
    """Statistics of every row; memory of a few numbers per row."""
    from memopt.kernels.losses.tiles_triton import statistics_kernel

    p, M = problem, problem.rows
    V, H = p.weight.shape
    device = p.hidden.device
    blocks = -(-M // STATISTICS_TILE["BM"])
    parts = _parts(blocks, -(-V // STATISTICS_TILE["BV"]))
    out = torch.empty(parts, 5, M, dtype=torch.float32, device=device)
    argmax = torch.empty(parts, M, dtype=torch.int64, device=device)
    if M and not values_unknown(p.hidden):
        statistics_kernel[(blocks, parts)](
            *_inputs(p), out, argmax, M, V, H,
            **_flags(p), WANT_WEIGHTED=p.settings.label_smoothing > 0, WANT_EXPECTED=p.settings.want_stats,
            INTERPRET=interpreting(), **STATISTICS_TILE,
        )  # fmt: skip
    statistics, argmax = p.shard.merge(*_merge_parts(out, argmax))
    rounded = torch.empty(2, M, dtype=p.opmath, device=device)
    loss, entropy = torch.empty(2, M, dtype=p.opmath, device=device)
    result = RowResult(rounded, loss, entropy, argmax, Gradients())
    reduce_rows(p, statistics, lse_coefficient(p, 0, M, None), slice(0, M), result)
    return result


def tile_gradients(problem: Problem, wanted: Wanted, lse: Tensor, upstream: Upstream) -> Gradients:
    """The wanted gradients from tiles made again, once for the rows' and once for the entries' side.

    Memory: 4 bytes per element of ``hidden``, and ``settings.chunk_bytes`` for float32 sums of the weight's gradient, a
    part of the vocabulary at a time, so that each element is rounded once whatever ``accumulate`` says.
    """
    p, M = problem, problem.rows
    V, H = p.weight.shape
    device = p.hidden.device
    coefficients = row_coefficients(p, upstream, lse, lse_coefficient(p, 0, M, None), 0, M)
    order = _by_mean_logit(p) if p.settings.gradient_filter else None
    made = Gradients()
    if wanted.hidden or wanted.scale:
        blocks = -(-M // GRADIENT_TILE["BO"])
        parts = _parts(blocks, -(-V // GRADIENT_TILE["BT"]))
        of_hidden = torch.zeros(p.hidden.shape, dtype=torch.float32, device=device)
        by_scale = torch.zeros(parts, M, dtype=torch.float32, device=device)
        _launch(p, coefficients, order, of_hidden, by_scale, blocks, parts, rows_own=True, want_sum=wanted.scale)
        made.hidden = p.shard.sum_(of_hidden).to(p.hidden.dtype) if wanted.hidden else None
        made.scale = p.shard.sum_(by_scale.sum()) if wanted.scale else None
    if wanted.weight or wanted.bias:
        of_weight = torch.empty(V, H, dtype=p.weight.dtype, device=device)
        by_entry = torch.zeros(V, dtype=torch.float32, device=device)
        for part in even_chunks(V, 4 * H, p.settings.chunk_bytes):
            sums = torch.zeros(part.stop - part.start, H, dtype=torch.float32, device=device)
            biases = torch.zeros(part.stop - part.start, dtype=torch.float32, device=device)
            blocks = -(-sums.shape[0] // GRADIENT_TILE["BO"])
            if order is None:
                chosen: Tensor | slice = part
                _launch(_entries(p, part), coefficients, None, sums, biases, blocks, 1, False, wanted.bias)
            else:
                chosen = order[part]
                _launch(p, coefficients, chosen, sums, biases, blocks, 1, False, wanted.bias)
            of_weight[chosen] = sums.to(of_weight.dtype)
            by_entry[chosen] = biases
        made.weight = of_weight if wanted.weight else None
        made.bias = by_entry if wanted.bias else None
    return made


def _by_mean_logit(p: Problem) -> Tensor:
    """The entries by falling mean logit, so that large logits share tiles; a mean of products is one product."""
    mean = p.weight @ p.hidden.mean(0)
    return (mean if p.bias is None else mean + p.bias).argsort(descending=True)


def _entries(p: Problem, part: slice) -> Problem:
    """The same problem with a part of the vocabulary: targets elsewhere fall outside of it."""
    return replace(
        p,
        weight=p.weight[part],
        bias=None if p.bias is None else p.bias[part],
        class_weight=None if p.class_weight is None else p.class_weight[part],
        target=None if p.target is None else p.target - part.start,
    )


def _launch(
    p: Problem,
    coefficients: Tensor,
    order: Tensor | None,
    out: Tensor,
    sums: Tensor,
    blocks: int,
    parts: int,
    rows_own: bool,
    want_sum: bool,
) -> None:
    from memopt.kernels.losses.tiles_triton import gradient_kernel

    if p.rows == 0 or values_unknown(p.hidden):
        return
    gradient_kernel[(blocks, parts)](
        *_inputs(p), coefficients, order, p.settings.gradient_filter, out, sums,
        p.rows, p.weight.shape[0] if order is None else order.shape[0], p.weight.shape[1],
        **_flags(p), HAS_ORDER=order is not None, ROWS_OWN=rows_own, WANT_SUM=want_sum, SPLIT=parts > 1,
        INTERPRET=interpreting(), **GRADIENT_TILE,
    )  # fmt: skip


def _inputs(p: Problem) -> tuple[object, ...]:
    hidden, weight = p.hidden.contiguous(), p.weight.contiguous()
    return hidden, weight, p.index, p.target, p.bias, p.class_weight, p.scale, p.settings.softcap


def _flags(p: Problem) -> dict[str, bool]:
    return {
        "HAS_INDEX": p.index is not None,
        "HAS_BIAS": p.bias is not None,
        "HAS_WEIGHT": p.class_weight is not None,
        "HAS_CAP": p.settings.softcap > 0,
    }


def _parts(blocks: int, tiles: int) -> int:
    return max(1, min(tiles, _PROGRAMS // max(1, blocks)))


def _merge_parts(out: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of parts of the vocabulary to those of all of it; the smallest entry among equal maxima."""
    highest = out[:, 0].amax(0)
    below = torch.where(out[:, 0] == highest, 0.0, out[:, 0] - highest)
    shrink = below.exp()
    moved = torch.where(shrink > 0, out[:, 2] + out[:, 1] * below.clamp_min(-1e4), 0.0)
    sums = [(out[:, 1] * shrink).sum(0), (moved * shrink).sum(0), out[:, 3].sum(0), out[:, 4].sum(0)]
    entry = torch.where(out[:, 0] == highest, argmax, 2**62).amin(0)
    return torch.stack([highest, *sums]), entry
