"""Prints what updates whole blocks where there are many registers: the second pass of each beside the next one's first.

The second pass waits for roots and divisions; the first has none. Side by side they fill each other's gaps, and the new
states of two blocks are all that has to be held.
"""

from __future__ import annotations

from memopt.kernels.native.step_blocks import Blocks
from memopt.kernels.native.step_elements import Elements

MERGED_TILE = 4096  # elements: the first block of a tile and the last have one pass alone


class Merged(Blocks, Elements):
    """The function for whole blocks."""

    @property
    def merges(self) -> bool:
        """Whether all states are encoded, in blocks of one size, and the parameter is made of them at last."""
        blocks = {self._codec(j).block for j in self.kind.quantised}
        plain = len(self.kind.stored) - len(self.coded)
        whole = self.segment >= 32 and self.segment & (self.segment - 1) == 0
        return self.late is not None and not plain and blocks == {self.segment} and whole

    def merged(self) -> list[str]:
        """The definition of ``whole_blocks``, for n elements that are whole blocks."""
        return [
            "static void whole_blocks(const Task& t, int64_t row, int64_t col, int n, const float* uniforms)",
            "{",
            *self._open_tile(),
            *[line for j in self.coded for line in self._open_states(j)],
            f"P kept[{self.segment}];",
            "bool rare = false;",
            f"const int blocks = n / {self.segment};",
            "const auto pass = [&](int k, auto opens, auto closes) {",
            *self._both_passes(),
            "};",
            "using Yes = std::true_type;",
            "using No = std::false_type;",
            "pass(0, Yes(), No());",
            "for (int k = 1; k < blocks; k++) pass(k, Yes(), Yes());",
            "pass(blocks, No(), Yes());",
            "}",
        ]

    def _open_states(self, j: int) -> list[str]:
        codec = self._codec(j)
        return [
            *self._open_place(j, codec),
            f"alignas(64) float memory{j}[{2 * codec.block}];",
            f"const Ring<{2 * codec.block}> new{j}{{memory{j}}};",
            f"float inverses{j} = 0;",
        ]

    def _both_passes(self) -> list[str]:
        """The second pass of block k - 1, where it ``closes`` one, and the first of block k, where it ``opens`` one."""
        lines = [f"const int to = {self.segment} * k, before = to - {self.segment};", "(void)before;"]
        lines += [f"vf inverse{j} = splat(inverses{j}); vu maximum{j} = {{}};" for j in self.coded]
        for j in self.coded:
            lines += [f"const float scale{j} = opens ? scales{j}[block{j} + k] : 0;", *self._decoder(j)]
        lines += self._paired_loops() if self.paired else self._loops()
        return [
            *lines,
            "if (closes && __builtin_expect(rare, 0)) memcpy(param + before, kept, sizeof kept);",
            "if constexpr (opens) {",
            *self._close_block(),
            "}",
        ]

    def _loops(self) -> list[str]:
        inline, size = "__attribute__((always_inline))", self.segment
        first = [f"const auto first = [&](int j) {inline} {{", *self._element("vector"), "};"]
        opening = [f"for (int j = to; j < to + {size}; j += W) first(j);"]
        if not self.staged:
            second = [f"const auto second = [&](int j) {inline} {{", *self._second_element("vector"), "};"]
            closing = [f"for (int j = to; j < to + {size}; j += W) {{", f"second(j - {size});"]
            closing += ["if constexpr (opens) first(j);", "}"]
        else:
            second = [*self._ahead_struct(), *self._stages()]
            closing = [
                "Ahead ahead = begin(before);",
                f"for (int j = to; j < to + {size} - W; j += W) {{",
                f"Ahead next = begin(j + W - {size});",
                f"finish(j - {size}, ahead);",
                "if constexpr (opens) first(j);",
                "ahead = next;",
                "}",
                "finish(to - W, ahead);",
                f"if constexpr (opens) first(to + {size} - W);",
            ]
        words = [f"Words words{d}(key{d}, index + before);" for d in self._draws_of(self._late_slots)]
        return [*words, *first, *second, "if constexpr (closes) {", *closing, "} else {", *opening, "}"]

    def _paired_loops(self) -> list[str]:
        half, draws = self.segment // 2, self._draws_of(self._late_slots)
        place = f"index + to - {self.segment}"
        return [
            *[f"Words words{d}[] = {{{{key{d}, {place}}}, {{key{d}, {place} + {half}}}}};" for d in draws],
            f"for (int i = 0; i < {half}; i += W) {{",
            "if constexpr (closes) {",
            *[f"vu out{j}[2];" for j in self.coded],
            *self._halves("before", self._second_element("pair")),
            *[f"store_nibbles(packed{j} + before / 2 + i, out{j}[0], out{j}[1]);" for j in self.coded],
            "}",
            "if constexpr (opens) {",
            *[f"vu in{j} = (vu)load_bytes(packed{j} + to / 2 + i);" for j in self.coded],
            *self._halves("to", self._element("pair")),
            "}",
            "}",
        ]

    def _halves(self, start: str, element: list[str]) -> list[str]:
        """A block's element in its first half and the one in its second that shares the byte."""
        lines = ["{", f"const int second = 0, j = {start} + i;", *element, "}"]
        return [*lines, "{", f"const int second = 1, j = {start} + {self.segment // 2} + i;", *element, "}"]

    def _close_block(self) -> list[str]:
        """The scales of block k; the parameter too where its new states need care (see ``_between``)."""
        lines = ["rare = false;"]
        for j in self.coded:
            lines += [f"Scale closed{j} = scale_of(maximum{j}, {self._top(j)});", self._is_rare(j)]
        size = self.segment
        lines += [
            "if (__builtin_expect(rare, 0)) {",
            *self._open_words([len(self.kind.stored)], "to"),
            f"for (int j = to; j < to + {size}; j += W) {{",
            *self._late_element("vector"),
            "}",
            "memcpy(kept, param + to, sizeof kept);",
            f"float* const states[] = {{{', '.join(f'new{j} + to' for j in self.coded)}}};",
            f"start_anew(states, {len(self.coded)}, {size});",
            *[f"closed{j} = scale_again(new{j} + to, {size}, {self._top(j)});" for j in self.coded],
            "}",
        ]
        for j in self.coded:
            scale = self._in_units(j, f"closed{j}.scale")
            lines.append(f"scales{j}[block{j} + k] = {scale}, inverses{j} = closed{j}.inverse;")
        return lines
