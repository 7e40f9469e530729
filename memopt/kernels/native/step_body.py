"""Prints the function that updates one tile of a parameter: decode and update, scales, encode and store."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from memopt.kernels.codecs import Codec
from memopt.kernels.native.cpp import CPP_TYPES
from memopt.kernels.native.step_blocks import Blocks
from memopt.kernels.native.step_elements import Elements


class Body(Blocks, Elements):
    """All of the function; ``function`` is its text."""

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
