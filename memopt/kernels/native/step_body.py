"""Prints the function that updates one tile of a parameter: decode and update, scales, encode and store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from memopt.kernels.codecs import Codec
from memopt.kernels.native.cpp import has_factors, literal
from memopt.kernels.update import Update

CPP_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
PREFETCH = 512  # elements ahead


@dataclass(frozen=True)
class StepKind:
    """What one compiled step is made for; ``stored`` has a codec or a dtype for each state.

    ``restart``: elements with a new value that is not finite start anew, at zero; only Triton's quantisers do without.
    ``scaled``: a state may be decoded times the number that the rule multiplies it by, which must not be negative.
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


@dataclass(frozen=True)
class Body:
    """What the function is made of; ``function`` is its text."""

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
    gains: dict[int, int]  # the number in ``U`` that a state is decoded times

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
            *([f"const bool whole = n % {self.segment} == 0;"] if self.paired else []),
        ]
        for j, stored in enumerate(self.kind.stored):
            lines += self._open_codec(j, stored) if isinstance(stored, Codec) else self._open_plain(j, stored)
        lines += [f"vf sum{k} = {{}};" for k in range(len(self.sums))]
        lines += self._pass(self._early_slots, self._segment_scales(), self._element, self._segment_maxima())
        if self.coded:
            lines += self._between()
            lines += self._pass(self._late_slots, self._segment_inverses(), self._second_element, [])
            if self.late is not None:
                lines.append("if (__builtin_expect(rare, 0)) memcpy(param, kept, n * sizeof(P));")
        for j in self.coded:
            lines += [self._narrow(j), *self._pack(j)]
        for k in range(len(self.sums)):
            lines.append(f"for (int i = 0; i < W; i++) sums[{k}] += sum{k}[i];")
        return "\n    ".join(lines) + "\n}\n"

    @property
    def coded(self) -> list[int]:
        """Numbers of the states that are encoded."""
        return [j for j in self.kind.quantised if j in self.news]

    @property
    def paired(self) -> list[int]:
        """Numbers of the states whose 4-bit codes are taken two by two where every block is whole: a byte has those of
        an element in a block's first half and one in its second. None where blocks are not the segments."""
        four = {j: s.block for j, s in enumerate(self.kind.stored) if isinstance(s, Codec) and s.bits == 4}
        return list(four) if self.segment % 32 == 0 and set(four.values()) == {self.segment} else []

    def _pass(
        self, slots: Iterable[int], before: list[str], element: Callable[[str], list[str]], after: list[str]
    ) -> list[str]:
        """A loop over the segments of the tile; where they are whole, by pairs of elements that share a byte."""
        lines = self._each_segment([*self._open_words(slots), *before], element, after)
        if not self.paired:
            return lines
        half, draws = self.segment // 2, self._draws_of(slots)
        words = [f"Words words{d}[] = {{{{key{d}, index + from}}, {{key{d}, index + from + {half}}}}};" for d in draws]
        encodes = not after
        states = [j for j in self.paired if not encodes or j in self.coded]
        place = "from / 2 + i"
        stores = [f"keep_nibbles(packed{j} + {place}, new{j} + {place}, out{j}[0], out{j}[1]);" for j in states]
        return [
            "if (whole) {",
            f"for (int from = 0; from < n; from += {self.segment}) {{",
            *words,
            *before,
            f"for (int i = 0; i < {half}; i += W) {{",
            *[f"vu out{j}[2];" if encodes else f"vu in{j} = (vu)load_bytes(packed{j} + from / 2 + i);" for j in states],
            *["{", "const int second = 0, j = from + i;", *element("pair"), "}"],
            *["{", f"const int second = 1, j = from + {half} + i;", *element("pair"), "}"],
            *(stores if encodes else []),
            "}",
            *after,
            "}",
            "} else {",
            *lines,
            "}",
        ]

    def _each_segment(self, before: list[str], element: Callable[[str], list[str]], after: list[str]) -> list[str]:
        """A loop over the segments of the tile, in steps of a vector and with what is left of one."""
        return [
            f"for (int from = 0; from < n; from += {self.segment}) {{",
            f"int to = from + {self.segment} < n ? from + {self.segment} : n, j = from;",
            *before,
            "for (; j + W <= to; j += W) {",
            *element("vector"),
            "}",
            "if (j < to) {",
            "int m = to - j;",
            *element("tail"),
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
                *self._unless_paired(
                    j,
                    self._each_block(
                        j, codec, [f"unpack(codes{j} + at, packed{j} + (at / {block}) * {(block + 1) // 2}, length);"]
                    ),
                ),
            ]
        return lines

    def _unless_paired(self, j: int, lines: list[str]) -> list[str]:
        return ["if (!whole) {", *lines, "}"] if j in self.paired else lines

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
            scale = f"(scale{j} * uniforms[{self.gains[j]}])" if j in self.gains else f"scale{j}"
            parts = [part.replace("scale", scale) for part in self.scale_parts[j]]
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

    def _words(self, slots: Iterable[int], how: str) -> list[str]:
        """The random words of some slots that need them."""
        place = "[second]" if how == "pair" else ""
        return [f"vu w{draw} = words{draw}{place}.next();" for draw in self._draws_of(slots)]

    def _element(self, how: str) -> list[str]:
        """The first pass: decode, update, keep the new states for the second, store what has no codec.

        ``how``: a ``"vector"``, its ``"tail"`` of m elements, or one of a ``"pair"`` of vectors.
        """
        kind, count, early, tail = self.kind, len(self.kind.stored), self.late is None, how == "tail"
        some, extra = ("_some", ", m") if tail else ("", "")
        load = "load_some" if tail else "load"
        lines = [] if tail else [f"prefetch(grad + j + {PREFETCH});"]
        if not tail and early:
            lines.append(f"prefetch(param + j + {PREFETCH});")
        lines += [f"vf p = {load}(param + j{extra});", f"vf g = {load}(grad + j{extra});"]
        for j, stored in enumerate(kind.stored):
            if not isinstance(stored, Codec):
                lines.append(f"vf s{j} = {load}(plain{j} + j{extra});")
            elif how == "pair" and j in self.paired:
                lines.append(f"vf s{j} = value{j}((vi)(second ? in{j} >> 4 : in{j}));")
            elif stored.bits == 4:
                lines.append(f"vf s{j} = value{j}(load_bytes(codes{j} + j));")
            elif j in self.gains and has_factors(stored):
                lines += [
                    f"vf s{j}a, s{j}b;",
                    f"factors_{j}(load_codes{some}(codes{j} + j{extra}), c{j}, s{j}a, s{j}b);",
                ]
            else:
                lines.append(f"vf s{j} = decode_{j}(load_codes{some}(codes{j} + j{extra}), c{j});")
        lines += [*self.lines, *self._words(self._early_slots, how)]
        for j, name in self.news.items():
            if j in kind.quantised:
                value = f"first_lanes({name}, m)" if tail else name
                size = f"magnitude(n{j})" if kind.update.states[j].signed else f"as_u(n{j})"
                lines += [f"vf n{j} = {value};", f"store(new{j} + j, n{j});"]
                lines.append(f"maximum{j} = umax(maximum{j}, {size});")
            else:
                lines.append(self._store(f"plain{j} + j", name, j if j in kind.noisy else None, some, extra))
        if self.param and early:
            lines.append(self._store("param + j", self.param, count if count in kind.noisy else None, some, extra))
        for k, name in enumerate(self.sums):
            lines.append(f"sum{k} = sum{k} + {f'first_lanes({name}, m)' if tail else name};")
        return lines

    def _second_element(self, how: str) -> list[str]:
        """The second pass: encode the new states, and update the parameter where nothing else is needed for it.

        Codes may stay in the buffers, over values already encoded, until they are narrowed all at once.
        """
        kind, tail = self.kind, how == "tail"
        lines = [] if tail or self.late is None else [f"prefetch(param + j + {PREFETCH});"]
        lines += self._words(self._late_slots, how)
        for j in self.coded:
            noise = f"noise_of(w{j // 2}, {j})" if j in kind.noisy else "splat(0)"
            lines += [f"vf n{j} = load(new{j} + j);", f"vf e{j} = encode_{j}(n{j}, inverse{j}, {noise});"]
            if how == "pair" and j in self.paired:
                lines.append(f"out{j}[second] = as_u(e{j});")
            elif tail:
                lines.append(f"keep_codes_some(codes{j} + j, new{j} + j, e{j}, m);")
            else:
                lines.append(f"keep_codes(codes{j} + j, new{j} + j, e{j});")
        return [*lines, *self._late_update(how)]

    def _late_update(self, how: str) -> list[str]:
        """The parameter from the new states, where that waits for the second pass."""
        if self.late is None:
            return []
        count = len(self.kind.stored)
        some, extra = ("_some", ", m") if how == "tail" else ("", "")
        slot = count if count in self.kind.noisy else None
        lines = [f"vf p = load{some}(param + j{extra});", f"vf g = load{some}(grad + j{extra});", *self.late]
        return [*lines, self._store("param + j", self.param, slot, some, extra)]

    def _late_element(self, how: str) -> list[str]:
        """The parameter alone, from the new states as the first pass left them."""
        states = [f"vf n{j} = load(new{j} + j);" for j in self.coded]
        return [*self._words([len(self.kind.stored)], how), *states, *self._late_update(how)]

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

    def _narrow(self, j: int) -> str:
        if j in self.paired:
            return f"narrow(whole ? packed{j} : codes{j}, new{j}, whole ? n / 2 : n);"
        return f"narrow(codes{j}, new{j}, n);"

    def _pack(self, j: int) -> list[str]:
        codec = self.kind.stored[j]
        assert isinstance(codec, Codec)
        if codec.bits != 4:
            return []
        place = f"packed{j} + k * {(codec.block + 1) // 2}"
        return self._unless_paired(j, self._each_block(j, codec, [f"pack({place}, codes{j} + at, length);"]))
