"""Traces written by hand: a small transformer-like step, operation by operation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from memopt.planner.devices import Rates
from memopt.planner.values import Block, Category, Op, Phase, SavedStorage, Storage, Trace

CPU = Rates("toy-cpu", 1e9, 1e9, 1e8, 1e8, 10**12, "disk", overlap=False)
GPU = Rates("toy-gpu", 1e12, 1e11, 2e9, 2e9, 10**12, "host", overlap=True)


@dataclass
class Script:
    """Collects operations and storages; lifetimes follow from ``keep_until``."""

    ops: list[Op] = field(default_factory=list)
    storages: list[dict[str, object]] = field(default_factory=list)

    def storage(self, size: int, category: Category, name: str, birth: int | None = None) -> int:
        at = len(self.ops) if birth is None else birth
        self.storages.append({"bytes": size, "category": category, "birth": at, "death": at + 1, "name": name})
        return len(self.storages) - 1

    def op(
        self,
        name: str,
        phase: Phase,
        reads: list[int],
        size: int | None,
        *,
        writes: list[int] | None = None,
        flops: int = 0,
        category: Category = Category.ACTIVATIONS,
    ) -> int:
        out = list(writes or [])
        if size is not None:
            out.append(self.storage(size, category, name))
        index = len(self.ops)
        moved_in = sum(self.size(r) for r in reads)
        moved_out = sum(self.size(w) for w in out)
        self.ops.append(Op(index, name, phase, None, flops, moved_in, moved_out, tuple(reads), tuple(out)))
        for used in (*reads, *out):
            self.alive_until(used, index + 1)
        return out[-1] if out else -1

    def size(self, storage: int) -> int:
        return int(str(self.storages[storage]["bytes"]))

    def birth(self, storage: int) -> int:
        return int(str(self.storages[storage]["birth"]))

    def alive_until(self, storage: int, time: int) -> None:
        self.storages[storage]["death"] = max(int(str(self.storages[storage]["death"])), time)

    def trace(self, blocks: list[Block], dtype: str = "float32") -> Trace:
        end = len(self.ops)
        found = []
        for n, s in enumerate(self.storages):
            lasting = s["category"] in (Category.WEIGHTS, Category.OPTIMIZER)
            death = end if lasting else int(str(s["death"]))
            birth = self.birth(n)
            producer = None if lasting else birth
            found.append(Storage(n, self.size(n), s["category"], birth, death, producer, str(s["name"])))  # type: ignore[arg-type]
        change = [0] * (end + 1)
        for storage in found:
            change[storage.birth] += storage.bytes
            change[storage.death] -= storage.bytes
        peak = live = 0
        for step in change:
            live += step
            peak = max(peak, live)
        owner = {op: n for n, b in enumerate(blocks) for run in (b.forward, b.backward) for op in range(*run)}
        ops = tuple(replace(op, block=owner.get(op.index)) for op in self.ops)
        return Trace("toy", ops, tuple(found), tuple(blocks), peak, dtype)


def transformer(
    layers: int = 3, unit: int = 1000, logits: int = 4, flops: int = 10**6, optimizer: int = 2, weight: int = 2
) -> Trace:
    """Blocks of norm, matmul (3 units), attention, matmul, norm, up (4), gelu (4), down; all saved but the sums.

    Sizes are multiples of ``unit`` bytes; each block has ``weight`` units of weights and ``optimizer`` of state.
    """
    s = Script()
    F, B = Phase.FORWARD, Phase.BACKWARD
    weights = [s.storage(weight * unit, Category.WEIGHTS, f"w{k}", 0) for k in range(layers)]
    states = [s.storage(optimizer * unit, Category.OPTIMIZER, f"m{k}", 0) for k in range(layers)]
    x = s.op("embedding", F, [], unit)
    made = []
    for k in range(layers):
        w, start = weights[k], len(s.ops)
        norm = s.op("norm", F, [x], unit)
        qkv = s.op("qkv", F, [norm, w], 3 * unit, flops=3 * flops)
        attention = s.op("attention", F, [qkv], unit, flops=2 * flops)
        out = s.op("out", F, [attention, w], unit, flops=flops)
        middle = s.op("add", F, [x, out], unit)
        norm2 = s.op("norm", F, [middle], unit)
        up = s.op("up", F, [norm2, w], 4 * unit, flops=4 * flops)
        gelu = s.op("gelu", F, [up], 4 * unit)
        down = s.op("down", F, [gelu, w], unit, flops=4 * flops)
        y = s.op("add", F, [middle, down], unit)
        saved = [norm, qkv, attention, middle, norm2, up, gelu]
        made.append((x, y, saved, (start, len(s.ops)), w))
        x = y
    head = s.op("head", Phase.LOSS, [x], logits * unit, flops=flops, category=Category.LOGITS)
    loss = s.op("loss", Phase.LOSS, [head], 8, category=Category.LOGITS)
    g = s.op("loss_backward", B, [loss, head], logits * unit, category=Category.LOGITS)
    g = s.op("head_backward", B, [g, x], unit)
    blocks, gradients = [], []
    for k in reversed(range(layers)):
        x, y, (norm, qkv, attention, middle, norm2, up, gelu), forward, w = made[k]
        start = len(s.ops)
        dw = s.storage(weight * unit, Category.GRADIENTS, f"g{k}")
        gradients.append(dw)
        T = Category.TEMPORARIES
        d = s.op("down_backward", B, [g, gelu, w], 4 * unit, writes=[dw], flops=8 * flops, category=T)
        d = s.op("gelu_backward", B, [d, up], 4 * unit, category=T)
        d = s.op("up_backward", B, [d, norm2, w], unit, writes=[dw], flops=8 * flops, category=T)
        g = s.op("norm_backward", B, [d, middle, g], unit, category=T)
        d = s.op("out_backward", B, [g, attention, w], unit, writes=[dw], flops=2 * flops, category=T)
        d = s.op("attention_backward", B, [d, qkv, attention], 3 * unit, flops=5 * flops, category=T)
        d = s.op("qkv_backward", B, [d, norm, w], unit, writes=[dw], flops=6 * flops, category=T)
        g = s.op("norm_backward", B, [d, x, g], unit, category=T)
        saved = tuple(
            SavedStorage(i, v, s.size(v), s.birth(v), v not in (qkv, attention), "float32")
            for i, v in enumerate(made[k][2])
        )
        given = (SavedStorage(0, x, s.size(x), s.birth(x), True, "float32"),)
        blocks.append(Block(f"blocks.{k}", 0, 0, forward, (start, len(s.ops)), (x,), (y,), saved, "toy-block", given))
    for dw in gradients:
        s.alive_until(dw, len(s.ops))
    for k, w in enumerate(weights):
        s.op("adam", Phase.OPTIMIZER, [w, gradients[layers - 1 - k], states[k]], None, writes=[w, states[k]])
    return s.trace(blocks[::-1])
