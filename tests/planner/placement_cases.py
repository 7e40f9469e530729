"""Placement problems with known answers, made from seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence

from memopt.planner.placement import Buffer


def planted(seed: int, count: int, capacity: int, time: int = 1000, cut_time: float = 0.5) -> list[Buffer]:
    """A perfect packing taken apart: a capacity x time rectangle cut in two again and again (guillotine cuts).

    Every byte of the rectangle is used at every moment, so max-live and the best peak are both ``capacity``.
    """
    draw = random.Random(seed)
    pieces = [(0, time, 0, capacity)]
    while len(pieces) < count:
        tried = draw.sample(range(len(pieces)), min(4, len(pieces)))
        i = max(tried, key=lambda k: (pieces[k][1] - pieces[k][0]) * (pieces[k][3] - pieces[k][2]))
        start, stop, low, high = pieces[i]
        if draw.random() < cut_time and stop - start > 1:
            at = draw.randrange(start + 1, stop)
            pieces[i : i + 1] = [(start, at, low, high), (at, stop, low, high)]
        elif high - low > 1:
            at = draw.randrange(low + 1, high)
            pieces[i : i + 1] = [(start, stop, low, at), (start, stop, at, high)]
    draw.shuffle(pieces)
    return [Buffer(start, stop, high - low) for start, stop, low, high in pieces]


def scattered(seed: int, count: int, time: int = 200, longest: int = 60, largest: int = 4096) -> list[Buffer]:
    """Independent random lifetimes and sizes."""
    draw = random.Random(seed)
    starts = [draw.randrange(time) for _ in range(count)]
    return [Buffer(start, start + draw.randrange(1, longest + 1), draw.randrange(1, largest + 1)) for start in starts]


def training_step(layers: int, seed: int = 0) -> list[Buffer]:
    """Lifetimes like those of a transformer's step: weights throughout, activations from forward to backward,
    gradients in backward, temporaries inside a layer. Some 10 buffers a layer."""
    draw = random.Random(seed)
    span = 10 * layers
    buffers = [Buffer(0, 2 * span, 4096 * draw.randrange(1, 64))]
    for layer in range(layers):
        ahead, back = 10 * layer, 2 * span - 10 * (layer + 1)
        for k in range(4):
            buffers.append(Buffer(ahead + k, back + 10 - k, 4096 * (1 + k)))
        for k in range(3):
            buffers.append(Buffer(ahead + 2 * k, ahead + 2 * k + 3, 4096 * draw.randrange(1, 16)))
            buffers.append(Buffer(back + 2 * k, back + 2 * k + 3, 4096 * draw.randrange(1, 16)))
    return buffers


def always_full(seed: int, count: int, capacity: int) -> list[Buffer]:
    """Exactly ``capacity`` bytes alive at every moment, but made without addresses: some cannot be packed that tightly.

    At each moment one to three live buffers end and others of the same sum begin.
    """
    draw = random.Random(seed)

    def split(total: int) -> list[int]:
        cuts = sorted(draw.sample(range(1, total), min(draw.randrange(3), total - 1)))
        return [high - low for low, high in zip([0, *cuts], [*cuts, total], strict=True)]

    live = [(0, size) for size in split(capacity)]
    ended: list[Buffer] = []
    now = 0
    while len(ended) + len(live) < count:
        now += 1
        gone = draw.sample(live, draw.randrange(1, min(3, len(live)) + 1))
        ended += [Buffer(start, now, size) for start, size in gone]
        for pair in gone:
            live.remove(pair)
        live += [(now, size) for size in split(sum(size for _, size in gone))]
    return ended + [Buffer(start, now + 1, size) for start, size in live]


def fits(buffers: Sequence[Buffer], capacity: int) -> bool:
    """Whether any placement fits, by trying every offset of every buffer in order of start: for small capacities."""
    order = sorted(buffers, key=lambda b: (b.start, -b.size))
    offsets: list[int] = []

    def extend() -> bool:
        if len(offsets) == len(order):
            return True
        b = order[len(offsets)]
        near = [(at, at + other.size) for other, at in zip(order, offsets, strict=False) if other.meets(b)]
        for at in range(capacity - b.size + 1):
            if all(at >= high or low >= at + b.size for low, high in near):
                offsets.append(at)
                if extend():
                    return True
                offsets.pop()
        return False

    return extend()
