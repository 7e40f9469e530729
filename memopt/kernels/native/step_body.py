"""Prints the function that updates one tile of a parameter: decode and update, scales, encode and store."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from memopt.kernels.codecs import Codec
from memopt.kernels.native.step_merged import Merged


class Body(Merged):
    """All of the function; ``function`` is its text."""

    def function(self) -> str:
        size = self.segment
        lines = ["#if MEMOPT_AVX512", *self.merged(), "#endif"] if self.merges else []
        lines += [
            "static void one_tile(const Task& t, int64_t row, int64_t col, int n, const float* uniforms, double* sums)",
            "{",
        ]
        if self.merges:
            lines += [
                "#if MEMOPT_AVX512",
                f"if (const int whole = n % {size} == 0 ? n : (n / {size} - 1) * {size}; whole > 0) {{",
                "whole_blocks(t, row, col, whole, uniforms);",
                "col += whole, n -= whole;",
                "if (n == 0) return;",
                "}",
                "#endif",
            ]
        lines += [
            *self._open_tile(),
            *([f"const bool whole = n % {size} == 0;"] if self.paired else []),
        ]
        for j, stored in enumerate(self.kind.stored):
            lines += self._open_codec(j, stored) if isinstance(stored, Codec) else self._open_plain(j, stored)
        lines += [f"vf sum{k} = {{}};" for k in range(len(self.sums))]
        if self.coded:
            lines.append("bool rare = false;")
        lines += self._pass(self._early_slots, self._segment_scales(), self._element, self._close_segment())
        if self.coded:
            lines += self._between()
            lines += self._second_pass()
            if self.late is not None:
                lines.append("if (__builtin_expect(rare, 0)) memcpy(param, kept, n * sizeof(P));")
        for j in self.coded:
            lines += [*self._narrow(j), *self._pack(j)]
        for k in range(len(self.sums)):
            lines.append(f"for (int i = 0; i < W; i++) sums[{k}] += sum{k}[i];")
        return "\n    ".join(lines) + "\n}\n"

    def _pass(
        self,
        slots: Iterable[int],
        before: list[str],
        element: Callable[[str], list[str]],
        after: list[str],
        *,
        encodes: bool = False,
    ) -> list[str]:
        """A loop over the segments of the tile; where they are whole, by pairs of elements that share a byte. Those are
        encoded one by one where narrowing takes more than one instruction: it is done for many at last."""
        lines = self._each_segment([*self._open_words(slots), *before], element, after)
        if not self.paired:
            return lines
        half = self.segment // 2
        states = [j for j in self.paired if not encodes or j in self.coded]
        stores = self._store_pairs(states)
        return [
            f"if ({'MEMOPT_NARROWS && ' * encodes}whole) {{",
            f"for (int from = 0; from < n; from += {self.segment}) {{",
            *self._open_pairs(slots),
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

    def _second_pass(self) -> list[str]:
        """Encodes the new states. With many registers, each vector's slow operations begin before the last one's codes
        and parameter are made of theirs; pairs are two chains already, and two stages of them too many registers."""
        plain = self._pass(self._late_slots, self._segment_inverses(), self._second_element, [], encodes=True)
        if not self.staged:
            return plain
        before = [*self._open_words(self._late_slots), *self._segment_inverses(), *self._stages()]
        vectors = [
            "if (j + W <= to) {",
            "Ahead ahead = begin(j);",
            "for (; j + 2 * W <= to; j += W) {",
            "Ahead next = begin(j + W);",
            "finish(j, ahead);",
            "ahead = next;",
            "}",
            "finish(j, ahead);",
            "j += W;",
            "}",
        ]
        lines = self._each_segment(before, self._second_element, [], vectors)
        return ["#if MEMOPT_AVX512", *self._ahead_struct(), *lines, "#else", *plain, "#endif"]

    def _open_pairs(self, slots: Iterable[int]) -> list[str]:
        """The generators of random words for both halves of a segment."""
        half, draws = self.segment // 2, self._draws_of(slots)
        return [f"Words words{d}[] = {{{{key{d}, index + from}}, {{key{d}, index + from + {half}}}}};" for d in draws]

    def _store_pairs(self, states: Iterable[int]) -> list[str]:
        return [f"store_nibbles(packed{j} + from / 2 + i, out{j}[0], out{j}[1]);" for j in states]

    def _each_segment(
        self,
        before: list[str],
        element: Callable[[str], list[str]],
        after: list[str],
        vectors: list[str] | None = None,
    ) -> list[str]:
        """A loop over the segments of the tile, in steps of a vector and with what is left of one.

        ``vectors``: what takes the place of the loop over vectors.
        """
        return [
            f"for (int from = 0; from < n; from += {self.segment}) {{",
            f"int to = from + {self.segment} < n ? from + {self.segment} : n, j = from;",
            *before,
            *(vectors or ["for (; j + W <= to; j += W) {", *element("vector"), "}"]),
            "if (j < to) {",
            "int m = to - j;",
            *element("tail"),
            "}",
            *after,
            "}",
        ]

    def _between(self) -> list[str]:
        """Scales of the new values, between the passes.

        Where a new value is not finite, or a block's are so small that they are lifted, the buffers no longer hold what
        the parameter is made of, which is then computed before they change, and kept from the second pass.
        """
        lines = [f"P kept[{2 * self.tile}];"] if self.late is not None else []
        lines.append("if (__builtin_expect(rare, 0)) {")
        if self.late is not None:
            before = self._open_words([len(self.kind.stored)])
            lines += [*self._each_segment(before, self._late_element, []), "memcpy(kept, param, n * sizeof(P));"]
        lines += [
            f"float* const states[] = {{{', '.join(f'new{j}' for j in self.coded)}}};",
            f"start_anew(states, {len(self.coded)}, n);",
        ]
        for j in self.coded:
            lines += self._close_again(j)
        lines.append("}")
        for j in self.coded:
            lines += self._write_scales(j)
        return lines
