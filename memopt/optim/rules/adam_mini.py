"""Adam-mini (Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", 2024, algorithms 1 to 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memopt.kernels import State, Update
from memopt.optim import checks, sharding
from memopt.optim.attention import query_and_key_weights
from memopt.optim.batch import Batch
from memopt.optim.layout import is_flat
from memopt.optim.optimizer import ParamsT, RuleOptimizer
from memopt.optim.rules.adamw import EXP_AVG, adam_scalars
from memopt.optim.slot import Slot, SmallState


def adammini_update(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    """One element: AdamW's step with its block's denominator."""
    m, denominator = states
    m = s.beta1 * m + s.beta1_comp * (g * s.grad_scale)
    return s.keep * p - s.step_size * m / denominator, (m, denominator)


ADAMINI = Update(
    "adammini",
    (EXP_AVG, State("denominator", signed=False)),
    ("grad_scale", "beta1", "beta1_comp", "step_size", "keep"),
    adammini_update,
)


def block_count(shape: tuple[int, ...], rows_per_block: int | None) -> int:
    """Blocks of a parameter: by rows of its first dimension, or one block for the whole.

    Raises:
        ValueError: the rows do not divide into such blocks.
    """
    if rows_per_block is None:
        rows_per_block = 1 if len(shape) > 1 else 0
    if rows_per_block == 0 or len(shape) == 0:
        return 1
    if shape[0] % rows_per_block:
        raise ValueError(f"rows_per_block is {rows_per_block}, which does not divide a parameter of shape {shape}")
    return shape[0] // rows_per_block


def mini_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of a model: what makes queries and keys in blocks of a head, all the rest by shape."""
    rows = {id(weight): head for weight, head in query_and_key_weights(model)}
    groups: dict[int | None, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            head = rows.get(id(param))
            group = groups.setdefault(head, {"params": [], "rows_per_block": head})
            group["params"].append((name, param))
    return list(groups.values())


def _block_sums(grad: Tensor, count: int) -> Tensor:
    """The sums of squares, fp32, over ``count`` equal blocks of rows; no copy whatever the strides."""
    if count == 0:
        return grad.new_zeros(0, dtype=torch.float32)
    blocks: Tensor = torch.unflatten(grad, 0, (count, -1)) if grad.dim() else grad.view(1, 1)
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=tuple(range(1, blocks.dim())), dtype=torch.float32)
    return norms.square_()


class AdamMini(RuleOptimizer):
    """AdamW with one second moment for each block of a parameter: its mean over the block.

    For block ``B`` with gradient ``g`` at step ``t``::

        m = beta1 m + (1 - beta1) g
        v_B = beta2 v_B + (1 - beta2) mean of g^2 over B
        p = p (1 - lr weight_decay) - lr (m / (1 - beta1^t)) / (sqrt(v_B / (1 - beta2^t)) + eps)

    Blocks follow the blocks of the Hessian: a head where queries and keys are made; else one row (output neuron,
    token, output channel); the whole of a one-dimensional parameter.

    Args:
        params: a model, whose attention modules are found by their structure (``memopt.optim.attention``), or
            parameters or groups of them; then ``rows_per_block`` tells which are queries and keys.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: share of each parameter, times ``lr``, taken off every step.
        rows_per_block: rows of the first dimension in a block: the head size for queries and keys, 0 for one block;
            None: 1, and 0 for one-dimensional parameters.
        **common: ``state`` and the other options of :class:`memopt.optim.RuleOptimizer`.

    State: 4 bytes a parameter in fp32, 1.02 in 8bit, 0.53 in 4bit, and 4 bytes a block. Temporaries: less than 1 MiB,
    but 4 bytes an element of one parameter at a time where rows are shorter than the format's block.
    """

    rule = "adammini"
    elementwise = False

    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rows_per_block: int | None = None,
        **common: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rows_per_block": rows_per_block}
        super().__init__(mini_groups(params) if isinstance(params, nn.Module) else params, own, **common)

    def check(self, group: Mapping[str, Any]) -> None:
        checks.non_negative(group, "lr", "eps", "weight_decay")
        checks.fractions(group, "betas", 2)
        if group["rows_per_block"] is not None:
            checks.whole(group, "rows_per_block")
        for param in group.get("params", ()):
            if isinstance(param, Tensor):
                block_count(tuple(param.shape), group["rows_per_block"])

    def states(self, group: Mapping[str, Any], param: Tensor) -> tuple[State, ...]:
        count = block_count(tuple(param.shape), group["rows_per_block"])
        return (EXP_AVG, SmallState("block_avg_sq", signed=False, shape=(count,)))

    def update(self, batch: Batch) -> None:
        scalars = adam_scalars(batch.group, batch.step, batch.grad_scale)
        # short rows are handed over as one, for which their denominators are written out: one parameter at a time
        flat = any(slot.param.dim() > 1 and is_flat(slot.extent, slot.format.block) for slot in batch.slots)
        for one in batch.each() if flat else [batch]:
            one.run(ADAMINI, scalars, given={"denominator": self._denominators(one, scalars)})

    def _denominators(self, batch: Batch, scalars: Mapping[str, float]) -> list[Tensor]:
        """Advances the blocks' moments; each parameter's denominators, broadcast to its shape without a copy."""
        found = []
        for i, slot in enumerate(batch.slots):
            grad = batch.grad(i)
            moment = slot.operand(slot.specs[1])
            assert isinstance(moment, Tensor)
            if not slot.cut(slot.specs[1]) and sharding.is_sharded(slot.param):
                found.append(self._shared_denominators(slot, grad, moment, scalars))
                continue
            if grad.numel() == 0:
                found.append(torch.empty_like(grad, dtype=torch.float32))
                continue
            mean = _block_sums(grad, moment.numel()).div_(grad.numel() // moment.numel())
            moment.mul_(scalars["beta2"]).add_(mean, alpha=scalars["beta2_comp"] * batch.grad_scale**2)
            root = moment.sqrt().mul_(scalars["sqrt_bias2_inv"]).add_(scalars["eps"])
            if root.numel() > 1:
                root = root.repeat_interleave(grad.shape[0] // root.numel())
                root = root.view(-1, *([1] * (grad.dim() - 1)))
            found.append(root.expand(grad.shape) if grad.dim() else root.view(()))
        return found

    def _shared_denominators(self, slot: Slot, grad: Tensor, moment: Tensor, scalars: Mapping[str, float]) -> Tensor:
        """The same for blocks of which ranks hold parts: every rank has all moments and adds its rows' squares."""
        rows, count = slot.extent.shape[0], moment.numel()
        row_size = slot.extent.numel // rows
        first = sharding.offset_of(slot.param) // row_size
        block = torch.arange(first, first + grad.shape[0], device=grad.device) * count // rows
        squares = torch.zeros_like(moment).index_add_(0, block, _block_sums(grad, grad.shape[0]))
        sums = sharding.reduce_sum(squares, slot.param)
        moment.mul_(scalars["beta2"]).add_(
            sums, alpha=scalars["beta2_comp"] * scalars["grad_scale"] ** 2 * count / slot.extent.numel
        )
        root = moment.sqrt().mul_(scalars["sqrt_bias2_inv"]).add_(scalars["eps"])
        return root[block].view(-1, *([1] * (grad.dim() - 1))).expand(grad.shape)
