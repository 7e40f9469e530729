# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Tiles of logits that never leave the chip: each is a product made, used and forgotten inside one program.

Letters: M counted rows of ``hidden``, V entries, H features. ``statistics_kernel`` gives a block of rows the statistics
of a part of the vocabulary; ``gradient_kernel`` owns a block of one operand (rows or entries), meets every block of the
other, and adds each tile's gradient to the owner's rows of the output. One owner per output row: no locks, and with one
split the same sums in the same order every time.

Source: "Cut Your Losses in Large-Vocabulary Language Models" sections 4.2 and 4.3 (recomputed tiles, tiles of
negligible gradient skipped, entries in the order of their mean logits). We differ: owners instead of locks, so logits
are made twice in backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memopt.kernels.losses.triton_math import final_logits, product, round_to


@triton.jit
def _row_offsets(index_ptr, rows, count, HAS_INDEX: tl.constexpr):
    return tl.load(index_ptr + rows, mask=rows < count, other=0) if HAS_INDEX else rows.to(tl.int64)


@triton.jit
def _tile(
    a_ptr, a_rows, a_inside, b_ptr, b_rows, b_inside, H,
    BA: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(BA, BB) products of rows of a with rows of b, both with H contiguous features."""
    accumulator = tl.zeros((BA, BB), tl.float32)
    for first in range(0, H, BH):
        features = first + tl.arange(0, BH)
        known = features < H
        a = tl.load(a_ptr + a_rows[:, None] * H + features[None, :], mask=a_inside[:, None] & known[None, :], other=0.0)
        b = tl.load(b_ptr + b_rows[None, :] * H + features[:, None], mask=b_inside[None, :] & known[:, None], other=0.0)
        accumulator = product(a, b, accumulator, INTERPRET)
    return accumulator


@triton.jit
def statistics_kernel(
    hidden_ptr, weight_ptr, index_ptr, target_ptr, bias_ptr, class_weight_ptr, scale_ptr, softcap, out_ptr, argmax_ptr,
    M, V, H,
    HAS_INDEX: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    WANT_WEIGHTED: tl.constexpr, WANT_EXPECTED: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, parts of the vocabulary); ``out`` is (parts, 5, M) and ``argmax`` (parts, M)."""
    scale = tl.load(scale_ptr)
    part, parts = tl.program_id(1), tl.num_programs(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    counted = rows < M
    hidden_rows = _row_offsets(index_ptr, rows, M, HAS_INDEX)
    target = tl.load(target_ptr + rows, mask=counted, other=-1)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    expected = tl.zeros((BM,), tl.float32)
    weighted = tl.zeros((BM,), tl.float32)
    found = tl.zeros((BM,), tl.float32)
    best = tl.zeros((BM,), tl.int32)
    for first in range(part * BV, V, parts * BV):
        entries = first + tl.arange(0, BV)
        inside = entries < V
        raw = _tile(
            hidden_ptr, hidden_rows, counted, weight_ptr, entries.to(tl.int64), inside, H, BM, BV, BH, INTERPRET
        )
        if HAS_BIAS:
            raw += tl.load(bias_ptr + entries, mask=inside, other=0.0)[None, :]
        z = final_logits(raw, scale, softcap, HAS_CAP)
        found += tl.sum(tl.where(entries[None, :] == target[:, None], z, 0.0), 1)
        if WANT_WEIGHTED:
            share = tl.where(inside[None, :], z, 0.0)
            if HAS_WEIGHT:
                share *= tl.load(class_weight_ptr + entries, mask=inside, other=0.0)[None, :]
            weighted += tl.sum(share, 1)
        z = tl.where(inside[None, :], z, float("-inf"))
        top = tl.max(z, 1)
        entry = tl.min(tl.where(z == top[:, None], entries[None, :], V), 1)
        best = tl.where(top > highest, entry, best)
        higher = tl.maximum(highest, top)
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(highest - reference)
        e = tl.exp(z - reference[:, None])
        if WANT_EXPECTED:
            expected = tl.where(shrink > 0, expected + total * tl.maximum(highest - reference, -1e4), 0.0) * shrink
            expected += tl.sum(tl.where(e > 0, e * tl.maximum(z - reference[:, None], -1e4), 0.0), 1)
        total = total * shrink + tl.sum(e, 1)
        highest = higher
    out = out_ptr + part * 5 * M + rows
    tl.store(out, highest, mask=counted)
    tl.store(out + M, total, mask=counted)
    tl.store(out + 2 * M, expected, mask=counted)
    tl.store(out + 3 * M, found, mask=counted)
    tl.store(out + 4 * M, weighted, mask=counted)
    tl.store(argmax_ptr + part * M + rows, best.to(tl.int64), mask=counted)


@triton.jit
def _along_rows(values, ROWS_OWN: tl.constexpr):
    """A value per row as a column of an owner-by-other tile whose owner is rows, else as a line."""
    return values[:, None] if ROWS_OWN else values[None, :]


@triton.jit
def _along_entries(values, ROWS_OWN: tl.constexpr):
    return values[None, :] if ROWS_OWN else values[:, None]


@triton.jit
def gradient_kernel(
    hidden_ptr, weight_ptr, index_ptr, target_ptr, bias_ptr, class_weight_ptr, scale_ptr, softcap, coefficient_ptr,
    order_ptr, filter_below, out_ptr, sum_ptr, M, V, H,
    ROWS_OWN: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr, WANT_SUM: tl.constexpr, SPLIT: tl.constexpr,
    BO: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of the owner, parts of the other). ``out`` starts at zero.

    Rows own: the gradient of ``hidden``, and ``sum`` (parts, M) that of the scale by row. Entries own: the gradient of
    the weight, and ``sum`` (parts, V) that of the bias. With SPLIT, parts add to ``out`` (float32) atomically. With an
    order the V entries are those that it names; ``out`` and ``sum`` of entries are in its order.
    """
    scale = tl.load(scale_ptr)
    part, parts = tl.program_id(1), tl.num_programs(1)
    owners = tl.program_id(0) * BO + tl.arange(0, BO)
    element = hidden_ptr.dtype.element_ty
    O = M if ROWS_OWN else V  # noqa: E741
    others_count = V if ROWS_OWN else M
    owned = owners < O
    if ROWS_OWN:
        owner_rows = _row_offsets(index_ptr, owners, M, HAS_INDEX)
        out_rows = owner_rows
    else:
        owner_rows = _row_offsets(order_ptr, owners, V, HAS_ORDER)
        out_rows = owners.to(tl.int64)
    own_ptr = hidden_ptr if ROWS_OWN else weight_ptr
    other_ptr = weight_ptr if ROWS_OWN else hidden_ptr
    sums = tl.zeros((BO,), tl.float32)
    for first in range(part * BT, others_count, parts * BT):
        others = first + tl.arange(0, BT)
        there = others < others_count
        if ROWS_OWN:
            other_rows = _row_offsets(order_ptr, others, V, HAS_ORDER)
        else:
            other_rows = _row_offsets(index_ptr, others, M, HAS_INDEX)
        raw = _tile(own_ptr, owner_rows, owned, other_ptr, other_rows, there, H, BO, BT, BH, INTERPRET)
        rows = owners if ROWS_OWN else others
        counted = owned if ROWS_OWN else there
        entries = other_rows if ROWS_OWN else owner_rows
        inside = there if ROWS_OWN else owned
        if HAS_BIAS:
            raw += _along_entries(tl.load(bias_ptr + entries, mask=inside, other=0.0), ROWS_OWN)
        z = final_logits(raw, scale, softcap, HAS_CAP)
        lse = tl.load(coefficient_ptr + rows, mask=counted, other=0.0)
        of_softmax = tl.load(coefficient_ptr + M + rows, mask=counted, other=0.0)
        of_target = tl.load(coefficient_ptr + 2 * M + rows, mask=counted, other=0.0)
        of_uniform = tl.load(coefficient_ptr + 3 * M + rows, mask=counted, other=0.0)
        target = tl.load(target_ptr + rows, mask=counted, other=-1)
        d = _along_rows(of_softmax, ROWS_OWN) * tl.exp(z - _along_rows(lse, ROWS_OWN))
        if HAS_WEIGHT:
            weights = tl.load(class_weight_ptr + entries, mask=inside, other=0.0)
            d -= _along_rows(of_uniform, ROWS_OWN) * _along_entries(weights, ROWS_OWN)
        else:
            d -= _along_rows(of_uniform, ROWS_OWN)
        hit = _along_entries(entries, ROWS_OWN) == _along_rows(target, ROWS_OWN)
        d -= tl.where(hit, _along_rows(of_target, ROWS_OWN), 0.0)
        if HAS_CAP:
            ratio = z / softcap
            d *= 1.0 - ratio * ratio
        d = tl.where(owned[:, None] & there[None, :], d, 0.0)
        if WANT_SUM:
            sums += tl.sum(d * raw if ROWS_OWN else d * scale, 1)
        above = tl.max(tl.abs(d) - filter_below * _along_rows(tl.abs(of_softmax), ROWS_OWN))
        if above > 0.0 or filter_below == 0.0:
            narrow = round_to(d * scale, element, INTERPRET)
            for feature in range(0, H, BH):
                features = feature + tl.arange(0, BH)
                known = features < H
                other = tl.load(
                    other_ptr + other_rows[:, None] * H + features[None, :],
                    mask=there[:, None] & known[None, :],
                    other=0.0,
                )
                made = product(narrow, other, tl.zeros((BO, BH), tl.float32), INTERPRET)
                place = out_ptr + out_rows[:, None] * H + features[None, :]
                where = owned[:, None] & known[None, :]
                if SPLIT:
                    tl.atomic_add(place, made, mask=where)
                else:
                    made += tl.load(place, mask=where, other=0.0).to(tl.float32)
                    tl.store(place, round_to(made, out_ptr.dtype.element_ty, INTERPRET), mask=where)
            tl.debug_barrier()  # the next tile reads what other threads of this program have written
    if WANT_SUM:
        tl.store(sum_ptr + part * O + owners, sums, mask=owned)
