"""Prints the fused step of one rule, with its codecs and dtypes, as one C++ translation unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from memopt.kernels.codecs import Codec
from memopt.kernels.expr import Expr, element, scalar
from memopt.kernels.native.cpp import Printer, codec_functions, header, literal, read
from memopt.kernels.update import Update

CPP_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
TILE = 512  # elements whose new states wait in buffers at once
PREFETCH = 1024  # elements ahead


@dataclass(frozen=True)
class StepKind:
    """What one compiled step is made for; ``stored`` has a codec or a dtype for each state.

    ``restart``: elements with a new value that is not finite start anew, at zero; only Triton's quantisers do without.
    """

    update: Update
    param: torch.dtype
    grad: torch.dtype
    stored: tuple[Codec | torch.dtype, ...]
    roundings: tuple[str, ...]
    param_rounding: str
    restart: bool = True

    @property
    def quantised(self) -> tuple[int, ...]:
        """Numbers of the states that have a codec."""
        return tuple(j for j, s in enumerate(self.stored) if isinstance(s, Codec))

    @property
    def noisy(self) -> tuple[int, ...]:
        """Slots that need random numbers; the parameter's comes after the states'."""
        slots = [j for j, r in enumerate(self.roundings) if r == "stochastic"]
        return (*slots, *([len(self.stored)] if self.param_rounding == "stochastic" else []))


def step_source(kind: StepKind) -> tuple[str, list[Expr]]:
    """The source, and the uniform expressions whose values go into its array ``U``."""
    count, update = len(kind.stored), kind.update
    inputs = tuple(element(f"s{j}") for j in range(count))
    p, g = element("p"), element("g")
    answer = update.apply(p, g, inputs, SimpleNamespace(**{name: scalar(name) for name in update.scalars}))
    new_p, states, sums = answer
    first = Printer(fuse=True)
    written = [j for j in range(count) if states[j] is not inputs[j]]
    stored = {states[j]: f"n{j}" for j in written if j in kind.quantised}
    late = new_p is not p and not sums and bool(stored) and _leaves(new_p, stored) <= {"p", "g"}
    names = first.print(*[states[j] for j in written], *([new_p] if new_p is not p and not late else []), *sums)
    second = first.sequel(stored)
    param_name = second.print(new_p)[0] if late else "" if new_p is p else names[len(written)]

    blocks = [s.block for s in kind.stored if isinstance(s, Codec)]
    tile = math.lcm(*blocks) if blocks else TILE
    tile *= -(-TILE // tile)
    parts = [header(), f"enum {{ N_STATES = {count}, N_SUMS = {len(sums)}, TILE = {tile} }};\n"]
    parts.append(read("step.hpp"))
    scale_parts: dict[int, list[str]] = {}
    for j in kind.quantised:
        codec = kind.stored[j]
        assert isinstance(codec, Codec)
        text, scale_parts[j] = codec_functions(codec, kind.roundings[j], str(j), exact_root=j == kind.quantised[0])
        parts.append(text)
    parts += [f"alignas(64) static const float T{i}[] = {{{', '.join(map(literal, t))}}};\n"
              for i, t in enumerate(first.tables)]  # fmt: skip
    body = _Body(
        kind,
        tile,
        min(blocks, default=tile),
        first.lines,
        dict(zip(written, names, strict=False)),
        param_name,
        second.lines if late else None,
        names[len(names) - len(sums) :] if sums else [],
        len(first.uniforms),
        scale_parts,
    )
    parts.append(body.function())
    return "".join(parts), first.uniforms


@dataclass(frozen=True)
class _Body:
    kind: StepKind
    tile: int
    segment: int
    lines: list[str]  # of the first pass
    news: dict[int, str]
    param: str
    late: list[str] | None  # what computes the parameter in the second pass
    sums: list[str]
    uniforms: int
    scale_parts: dict[int, list[str]]

    def function(self) -> str:
        lines = [
            "static void one_tile(const Task& t, int64_t row, int64_t col, int n, const float* uniforms, double* sums)",
            "{",
            *[f"const vf U{i} = splat(uniforms[{i}]);" for i in range(self.uniforms)],
            f"using P = {CPP_TYPES[self.kind.param]};",
            f"using G = {CPP_TYPES[self.kind.grad]};",
            "P* param = (P*)t.param + row * t.cols + col;",
            "const G* grad = (const G*)t.grad + row * t.cols + col;",
            *self._draws(),
        ]
        for j, stored in enumerate(self.kind.stored):
            lines += self._open_codec(j, stored) if isinstance(stored, Codec) else self._open_plain(j, stored)
        lines += [f"vf sum{k} = {{}};" for k in range(len(self.sums))]
        before = [*self._open_words(self._early_slots), *self._segment_scales()]
        lines += self._each_segment(before, self._element, self._segment_maxima())
        if self.coded:
            lines += self._between()
            before = [*self._open_words(self._late_slots), *self._segment_inverses()]
            lines += self._each_segment(before, self._second_element, [])
            if self.late is not None:
                lines.append("if (__builtin_expect(rare, 0)) memcpy(param, kept, n * sizeof(P));")
        for j in self.coded:
            lines += self._pack(j)
        for k in range(len(self.sums)):
            lines.append(f"for (int i = 0; i < W; i++) sums[{k}] += sum{k}[i];")
        return "\n    ".join(lines) + "\n}\n"

    @property
    def coded(self) -> list[int]:
        """Numbers of the states that are encoded."""
        return [j for j in self.kind.quantised if j in self.news]

    def _each_segment(self, before: list[str], element: Callable[[bool], list[str]], after: list[str]) -> list[str]:
        """A loop over the segments of the tile, in steps of a vector and with what is left of one."""
        return [
            f"for (int from = 0; from < n; from += {self.segment}) {{",
            f"int to = from + {self.segment} < n ? from + {self.segment} : n, j = from;",
            *before,
            "for (; j + W <= to; j += W) {",
            *element(False),
            "}",
            "if (j < to) {",
            "int m = to - j;",
            *element(True),
            "}",
            *after,
            "}",
        ]

    def _draws(self) -> list[str]:
        lines = []
        for draw in sorted({slot // 2 for slot in self.kind.noisy}):
            lines.append(f"uint32_t key{draw} = row_key(t.key, t.start + row * t.cols, {draw});")
        if lines:
            lines.insert(0, "uint32_t index = (uint32_t)(t.start + row * t.cols + col);")
        return lines

    def _open_codec(self, j: int, codec: Codec) -> list[str]:
        block = codec.block
        lines = [
            f"int64_t in_row{j} = blocks_in_row(t, {block}), block{j} = col / {block};",
            f"float* scales{j} = t.state[{j}].scales + row * in_row{j};",
            f"alignas(64) float new{j}[{2 * self.tile + 64}];",
            f"vu maxima{j}[{2 * self.tile // block + 2}] = {{}};",
            f"float inverses{j}[{2 * self.tile // block + 2}];",
        ]
        if codec.bits == 8:
            lines.append(f"uint8_t* codes{j} = t.state[{j}].data + row * t.cols + col;")
        else:
            lines += [
                f"uint8_t* packed{j} = t.state[{j}].data + row * bytes_in_row(t.cols, in_row{j}, {block}) "
                f"+ block{j} * {(block + 1) // 2};",
                f"alignas(64) uint8_t codes{j}[{2 * self.tile + 64}];",
                *self._each_block(
                    j, codec, [f"unpack(codes{j} + at, packed{j} + (at / {block}) * {(block + 1) // 2}, length);"]
                ),
            ]
        return lines

    def _each_block(self, j: int, codec: Codec, body: list[str]) -> list[str]:
        """A loop over the blocks of state j in this tile: number ``k``, place ``at`` and ``length``."""
        return [
            "for (int k = 0, at = 0; at < n; k++) {",
            f"int length = block{j} + k == in_row{j} - 1 ? n - at : {codec.block};",
            *body,
            "at += length;",
            "}",
        ]

    def _open_plain(self, j: int, dtype: torch.dtype) -> list[str]:
        kind = CPP_TYPES[dtype]
        return [f"{kind}* plain{j} = ({kind}*)t.state[{j}].data + row * t.cols + col;"]

    def _segment_scales(self) -> list[str]:
        lines = []
        for j in self.kind.quantised:
            codec = self.kind.stored[j]
            assert isinstance(codec, Codec)
            parts = [part.replace("scale", f"scale{j}") for part in self.scale_parts[j]]
            lines += [
                *self._block_of_segment(j, codec),
                f"float scale{j} = scales{j}[block{j} + k{j}];",
                f"const vf c{j}[] = {{{', '.join(f'splat({part})' for part in parts)}}};",
                f"vu maximum{j} = maxima{j}[k{j}];",
            ]
            if codec.bits == 4:
                lines.append(f"const auto value{j} = nibbles([&](vf code) {{ return decode_{j}(code, c{j}); }});")
        return lines

    @staticmethod
    def _block_of_segment(j: int, codec: Codec) -> list[str]:
        return [
            f"int64_t k{j} = from / {codec.block};",
            f"if (block{j} + k{j} >= in_row{j}) k{j} = in_row{j} - 1 - block{j};",
        ]

    def _segment_inverses(self) -> list[str]:
        lines = []
        for j in self.coded:
            codec = self.kind.stored[j]
            assert isinstance(codec, Codec)
            lines += [*self._block_of_segment(j, codec), f"vf inverse{j} = splat(inverses{j}[k{j}]);"]
        return lines

    def _segment_maxima(self) -> list[str]:
        return [f"maxima{j}[k{j}] = maximum{j};" for j in self.kind.quantised]

    @property
    def _early_slots(self) -> list[int]:
        """Slots whose random numbers the first pass may need: those of plain states, and an early parameter's."""
        plain = [j for j in self.news if j not in self.kind.quantised]
        return [*plain, *([len(self.kind.stored)] if self.late is None and self.param else [])]

    @property
    def _late_slots(self) -> list[int]:
        return [*self.coded, *([] if self.late is None else [len(self.kind.stored)])]

    def _draws_of(self, slots: Iterable[int]) -> list[int]:
        return sorted({slot // 2 for slot in slots if slot in self.kind.noisy})

    def _open_words(self, slots: Iterable[int]) -> list[str]:
        """Where a loop over elements begins: the generators of the random words that its slots need."""
        return [f"Words words{draw}(key{draw}, index + from);" for draw in self._draws_of(slots)]

    def _words(self, slots: Iterable[int]) -> list[str]:
        """The random words of some slots that need them."""
        return [f"vu w{draw} = words{draw}.next();" for draw in self._draws_of(slots)]

    def _element(self, tail: bool) -> list[str]:
        """The first pass: decode, update, keep the new states for the second, store what has no codec."""
        kind, count, early = self.kind, len(self.kind.stored), self.late is None
        some, extra = ("_some", ", m") if tail else ("", "")
        load = "load_some" if tail else "load"
        lines = [] if tail else [f"prefetch(grad + j + {PREFETCH});"]
        if not tail and early:
            lines.append(f"prefetch(param + j + {PREFETCH});")
        lines += [f"vf p = {load}(param + j{extra});", f"vf g = {load}(grad + j{extra});"]
        for j, stored in enumerate(kind.stored):
            if not isinstance(stored, Codec):
                lines.append(f"vf s{j} = {load}(plain{j} + j{extra});")
            elif stored.bits == 4:
                lines.append(f"vf s{j} = value{j}(load_bytes(codes{j} + j));")
            else:
                lines.append(f"vf s{j} = decode_{j}(load_codes{some}(codes{j} + j{extra}), c{j});")
        lines += [*self.lines, *self._words(self._early_slots)]
        for j, name in self.news.items():
            if j in kind.quantised:
                value = f"first_lanes({name}, m)" if tail else name
                lines += [f"vf n{j} = {value};", f"store(new{j} + j, n{j});",
                          f"maximum{j} = umax(maximum{j}, magnitude(n{j}));"]  # fmt: skip
            else:
                lines.append(self._store(f"plain{j} + j", name, j if j in kind.noisy else None, some, extra))
        if self.param and early:
            lines.append(self._store("param + j", self.param, count if count in kind.noisy else None, some, extra))
        for k, name in enumerate(self.sums):
            lines.append(f"sum{k} = sum{k} + {f'first_lanes({name}, m)' if tail else name};")
        return lines

    def _second_element(self, tail: bool) -> list[str]:
        """The second pass: encode the new states, and update the parameter where nothing else is needed for it."""
        kind = self.kind
        lines = [] if tail or self.late is None else [f"prefetch(param + j + {PREFETCH});"]
        lines += self._words(self._late_slots)
        for j in self.coded:
            noise = f"noise_of(w{j // 2}, {j})" if j in kind.noisy else "splat(0)"
            lines += [f"vf n{j} = load(new{j} + j);", f"vf e{j} = encode_{j}(n{j}, inverse{j}, {noise});"]
            if tail:
                lines.append(f"{{ uint8_t some[W]; store_codes(some, e{j}); memcpy(codes{j} + j, some, m); }}")
            else:
                lines.append(f"store_codes(codes{j} + j, e{j});")
        return [*lines, *self._late_update(tail)]

    def _late_update(self, tail: bool) -> list[str]:
        """The parameter from the new states, where that waits for the second pass."""
        if self.late is None:
            return []
        count = len(self.kind.stored)
        some, extra = ("_some", ", m") if tail else ("", "")
        slot = count if count in self.kind.noisy else None
        lines = [f"vf p = load{some}(param + j{extra});", f"vf g = load{some}(grad + j{extra});", *self.late]
        return [*lines, self._store("param + j", self.param, slot, some, extra)]

    def _late_element(self, tail: bool) -> list[str]:
        """The parameter alone, from the new states as the first pass left them."""
        states = [f"vf n{j} = load(new{j} + j);" for j in self.coded]
        return [*self._words([len(self.kind.stored)]), *states, *self._late_update(tail)]

    @staticmethod
    def _store(place: str, name: str, slot: int | None, some: str, extra: str) -> str:
        if slot is None:
            return f"store{some}({place}, {name}{extra});"
        return f"store_noisy{some}({place}, {name}, half_of(w{slot // 2}, {slot}){extra});"

    def _between(self) -> list[str]:
        """Scales of the new values, between the passes.

        Where a new value is not finite, or a block's are so small that they are lifted, the buffers no longer hold what
        the parameter is made of, which is then computed before they change, and kept from the second pass.
        """
        lines = ["bool rare = false;"]
        check = "if (__builtin_expect(s.lift != 1.0f, 0)) rare |= s.scale != 0;"
        for j in self.coded:
            lines += self._close_blocks(j, f"scale_of(maxima{j}[k], {self._top(j)})", check)
        if self.late is not None:
            lines.append(f"P kept[{2 * self.tile}];")
        lines.append("if (__builtin_expect(rare, 0)) {")
        if self.late is not None:
            before = self._open_words([len(self.kind.stored)])
            lines += [*self._each_segment(before, self._late_element, []), "memcpy(kept, param, n * sizeof(P));"]
        lines += [
            f"float* const states[] = {{{', '.join(f'new{j}' for j in self.coded)}}};",
            f"start_anew(states, {len(self.coded)}, n);",
        ]
        for j in self.coded:
            lines += self._close_blocks(j, f"scale_again(new{j} + at, length, {self._top(j)})")
        return [*lines, "}"]

    def _top(self, j: int) -> str:
        codec = self.kind.stored[j]
        assert isinstance(codec, Codec)
        return literal(codec.top(self.kind.roundings[j]))

    def _close_blocks(self, j: int, scale: str, *more: str) -> list[str]:
        codec = self.kind.stored[j]
        assert isinstance(codec, Codec)
        lines = [f"Scale s = {scale};", f"scales{j}[block{j} + k] = s.scale;", f"inverses{j}[k] = s.inverse;"]
        # peeled, the few rounds of this loop wait for each other's divisions
        return ["#pragma GCC unroll 1", *self._each_block(j, codec, [*lines, *more])]

    def _pack(self, j: int) -> list[str]:
        codec = self.kind.stored[j]
        assert isinstance(codec, Codec)
        if codec.bits != 4:
            return []
        place = f"packed{j} + k * {(codec.block + 1) // 2}"
        return self._each_block(j, codec, [f"pack({place}, codes{j} + at, length);"])


def _leaves(node: Expr, known: Container[Expr]) -> set[str]:
    """The elements that a node is made of, apart from what is known already."""
    found, seen, waiting = set[str](), set[Expr](), [node]
    while waiting:
        one = waiting.pop()
        if one in seen or one in known or one.uniform:
            continue
        seen.add(one)
        waiting += one.args
        if one.op == "input":
            found.add(one.name)
    return found
