"""Prints the fused step of one rule, with its codecs and dtypes, as one Triton kernel over many parameters.

A program takes R blocks of one parameter as a tile of R x WIDTH elements. Where every block of a launch is whole, no
access has a mask, and addresses are known to be multiples of 16 bytes, so that they are vectorised.

Letters: R blocks, BLOCK elements between their starts, WIDTH elements of the tile (BLOCK, or the next power of two).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from memopt.kernels.codecs import Codec
from memopt.kernels.expr import Expr, element, scalar
from memopt.kernels.gpu.printer import Printer, codec_lines
from memopt.kernels.native.step_kind import StepKind

TYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
# Columns of the table of parameters, all int64; two for each state follow: its address and that of its scales.
COLUMNS = ("cols", "per_row", "whole_per_row", "start", "number", "param", "grad")
# Columns of the table of programs, all int32.
PIECE = ("task", "first", "count", "last_of_row")
IMPORTS = """\
import triton
import triton.language as tl

from memopt.kernels.gpu.device import (
    base_key, copy_sign, exponent_of, half_of, noise_of, power_of_two, random_words, scale_of, sign_of, step_down,
    store_rounded
)


"""


def step_source(kind: StepKind, guarded: bool = False) -> tuple[str, list[Expr], list[float]]:
    """The text of a module with ``kernel``, the uniform expressions that are its arguments U0, ..., and its tables.

    ``guarded``: gradients are multiplied, and the step called off, by two numbers that the kernel reads.
    """
    count, update = len(kind.stored), kind.update
    inputs = tuple(element(f"s{j}") for j in range(count))
    p = element("p")
    scalars = SimpleNamespace(**{name: scalar(name) for name in update.scalars})
    new_p, states, sums = update.apply(p, element("g"), inputs, scalars)
    tables: list[float] = []
    printer = Printer("e", tables)
    written = [j for j in range(count) if states[j] is not inputs[j]]
    names = printer.print(*[states[j] for j in written], *([new_p] if new_p is not p else []), *sums)
    codecs = "".join(
        codec_lines(stored, kind.roundings[j], str(j), tables)
        for j, stored in enumerate(kind.stored)
        if isinstance(stored, Codec)
    )
    body = [
        *_opening(kind, guarded),
        *_loads(kind, printer.inputs | set(names), guarded),
        *printer.lines,
        *_words(kind),
    ]
    coded = {j: name for j, name in zip(written, names, strict=False) if j in kind.quantised}
    body += [f"raw{j} = tl.where(inside, {name}, 0.0)" for j, name in coded.items()]
    if kind.restart and coded:  # an element with a new value that is not finite raises no scale and starts anew
        finite = (f"((raw{j}.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000)" for j in coded)
        body.append(f"sound = {' & '.join(finite)}")
        body += [f"raw{j} = tl.where(sound, raw{j}, 0.0)" for j in coded]
    for j, name in zip(written, names, strict=False):
        body += _store_state(kind, j, name)
    if new_p is not p:
        body.append(_store("param + place", names[len(written)], count, kind))
    for k in range(len(sums)):
        name = names[len(names) - len(sums) + k]
        body.append(
            f"tl.store(sums + {len(sums)} * program + {k}, tl.sum(tl.sum(tl.where(inside, {name}, 0.0), 1), 0))"
        )
    guard = "guard, " if guarded else ""
    arguments = "".join(f"U{i}, " for i in range(len(printer.uniforms)))
    text = (
        f"{IMPORTS}{codecs}@triton.jit(do_not_specialize=['step_key'])\n"
        f"def kernel(table, pieces, tables, sums, {guard}step_key, {arguments}R: tl.constexpr, BLOCK: tl.constexpr, "
        "WIDTH: tl.constexpr, WHOLE: tl.constexpr, INTERPRET: tl.constexpr):\n"
    )
    return text + "".join(f"    {line}\n" for line in body), printer.uniforms, tables


def _opening(kind: StepKind, guarded: bool) -> list[str]:
    lines = ["program = tl.program_id(0)"]
    if guarded:
        lines += ["if tl.load(guard + 1) > 0.0:", "    return", "factor = tl.load(guard)"]
    lines += [f"{name} = tl.load(pieces + {len(PIECE)} * program + {i})" for i, name in enumerate(PIECE)]
    stride = len(COLUMNS) + 2 * len(kind.stored)
    lines.append(f"entry = table + task.to(tl.int64) * {stride}")
    lines += [f"{name} = tl.load(entry + {i})" for i, name in enumerate(COLUMNS[:5])]
    lines += [
        "block = first + tl.arange(0, R)[:, None]",
        "in_row = tl.maximum(whole_per_row, 1).to(tl.int32)",
        "row = tl.where(last_of_row != 0, block, block // in_row).to(tl.int64)",
        "at = tl.where(last_of_row != 0, per_row - 1, block % in_row)",
        "length = tl.where(last_of_row != 0, cols - (per_row - 1) * BLOCK, BLOCK)",
        "lane = tl.arange(0, WIDTH)[None, :]",
        "inside = (lane < length) & (block < first + count)",
        "mask = None if WHOLE else inside",
        "one = None if WHOLE else block < first + count",
        "origin = row * cols + at * BLOCK",
        "place = (tl.multiple_of(origin, (1, 16)) if WHOLE else origin) + lane",
        "block_number = row * per_row + at",
    ]
    dtypes = [kind.param, kind.grad]
    lines += [
        _pointer(name, i + 5, TYPES[dtype]) for i, (name, dtype) in enumerate(zip(COLUMNS[5:], dtypes, strict=True))
    ]
    for j, stored in enumerate(kind.stored):
        column = len(COLUMNS) + 2 * j
        lines.append(_pointer(f"data{j}", column, "tl.uint8" if isinstance(stored, Codec) else TYPES[stored]))
        if isinstance(stored, Codec):
            lines.append(f"scales{j} = tl.load(entry + {column + 1}).to(tl.pointer_type(tl.float32))")
    return lines


def _pointer(name: str, column: int, element_type: str) -> str:
    load = f"tl.load(entry + {column}).to(tl.pointer_type({element_type}))"
    return f"{name} = tl.multiple_of({load}, 16) if WHOLE else {load}"


def _loads(kind: StepKind, used: set[str], guarded: bool) -> list[str]:
    """What the rule reads, as float32; lanes outside are zero."""
    rest = "mask=mask, other=None if WHOLE else 0.0).to(tl.float32)"
    lines = [
        f"{name} = tl.load({pointer} + place, {rest}"
        for name, pointer in (("p", "param"), ("g", "grad"))
        if name in used
    ]
    if guarded and "g" in used:
        lines.append("g = g * factor")
    for j, stored in enumerate(kind.stored):
        if isinstance(stored, Codec) and stored.bits == 4:
            lines += [
                "half = (length + 1) // 2",
                "row_bytes = (per_row - 1) * ((BLOCK + 1) // 2) + (cols - (per_row - 1) * BLOCK + 1) // 2",
                "bytes_at = row * row_bytes + at * ((BLOCK + 1) // 2)",
                "bytes_at = tl.multiple_of(bytes_at, (1, 16)) if WHOLE else bytes_at",
            ]
        if f"s{j}" not in used:
            continue
        if not isinstance(stored, Codec):
            lines.append(f"s{j} = tl.load(data{j} + place, {rest}")
            continue
        if stored.bits == 8:
            lines.append(f"c{j} = tl.load(data{j} + place, mask=mask, other=None if WHOLE else 0).to(tl.int32)")
        else:
            lines += [
                "low_lane = lane % (WIDTH // 2) if WHOLE else tl.where(lane < half, lane, lane - half)",
                f"c{j} = tl.load(data{j} + bytes_at + low_lane, mask=mask, other=None if WHOLE else 0).to(tl.int32)",
                f"c{j} = tl.where(lane < half, c{j} & 15, c{j} >> 4)",
            ]
        lines += [
            f"scale{j} = tl.load(scales{j} + block_number, mask=one, other=None if WHOLE else 0.0)",
            f"s{j} = decode_{j}(c{j}.to(tl.float32), scale{j}, tables)",
        ]
    return lines


def _words(kind: StepKind) -> list[str]:
    draws = sorted({slot // 2 for slot in kind.noisy})
    lines = ["base = base_key(step_key, number)", "row_start = start + row * cols"] if draws else []
    return lines + [f"w{draw} = random_words(base, row_start, at * BLOCK + lane, {draw})" for draw in draws]


def _store(place: str, name: str, slot: int, kind: StepKind) -> str:
    noisy = slot in kind.noisy
    word = f"half_of(w{slot // 2}, {bool(slot % 2)})" if noisy else "0"
    return f"store_rounded({place}, {name}, mask, {word}, {noisy}, INTERPRET)"


def _store_state(kind: StepKind, j: int, name: str) -> list[str]:
    stored = kind.stored[j]
    if not isinstance(stored, Codec):
        return [_store(f"data{j} + place", name, j, kind)]
    noise = f"noise_of(w{j // 2}, {bool(j % 2)})"
    lines = [
        f"size{j} = raw{j}.to(tl.int32, bitcast=True) & 0x7FFFFFFF",
        f"largest{j} = tl.max(size{j}, 1, keep_dims=True)",
        f"scale{j}, lift{j}, inverse{j} = scale_of(largest{j}, {stored.top(kind.roundings[j])!r})",
        f"tl.store(scales{j} + block_number, scale{j}, mask=one)",
        f"kept{j} = tl.where(lift{j} == 0.0, 0.0, raw{j} * lift{j})",
        f"n{j} = {noise if j in kind.noisy else '0.0'}",
        f"c{j} = encode_{j}(kept{j}, inverse{j}, n{j}, tables).to(tl.int32, bitcast=True) & 255",
    ]
    if stored.bits == 8:
        return [*lines, f"tl.store(data{j} + place, c{j}.to(tl.uint8), mask=mask)"]
    return [
        *lines,
        "if WHOLE:",
        f"    pairs{j} = tl.reshape(tl.where(lane < WIDTH // 2, c{j}, c{j} << 4), (R, 2, WIDTH // 2))",
        f"    tl.store(data{j} + bytes_at + tl.arange(0, WIDTH // 2)[None, :], tl.sum(pairs{j}, 1).to(tl.uint8))",
        "else:",
        "    other = tl.minimum(lane + half, WIDTH - 1).to(tl.int32) + tl.zeros([R, WIDTH], tl.int32)",
        f"    high{j} = tl.where(lane + half < length, tl.gather(c{j}, other, 1) << 4, 0)",
        f"    tl.store(data{j} + bytes_at + lane, (c{j} | high{j}).to(tl.uint8), mask=one & (lane < half))",
    ]
