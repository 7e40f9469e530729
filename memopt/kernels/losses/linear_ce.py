"""The vocabulary loss of a language model without its logits: ``linear_cross_entropy`` and its autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.kernels.losses.checks import (
    autocast_dtype,
    autocast_off,
    check_group,
    check_inputs,
    refuse_second_derivatives,
)
from memopt.kernels.losses.compiled import linear_cross_entropy_forward
from memopt.kernels.losses.forward_backward import backward, forward
from memopt.kernels.losses.problem import prepare
from memopt.kernels.losses.row_pass import Gradients, Wanted
from memopt.kernels.losses.settings import DEFAULT_CHUNK_BYTES, LossStats, Settings
from memopt.kernels.losses.tile_pass import check_tiles

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    z_loss: float = 0.0,
    shift: int = 0,
    return_stats: bool = False,
    chunk_bytes: int | None = None,
    mode: str = "rows",
    accumulate: str = "once",
    gradient_filter: float = 0.0,
    process_group: ProcessGroup | None = None,
) -> Any:  # Tensor, or with return_stats a tuple of it and LossStats
    """Cross-entropy of ``softmax(hidden @ weight.T)``, the logits made a chunk at a time and never kept.

    For each position with final logits z = softcap * tanh(logit_scale * (weight @ h + bias) / softcap), target y and
    class weights w, with e the label smoothing over V entries:

        loss = (1 - e) * w[y] * (lse(z) - z[y]) + e / V * sum_v w[v] * (lse(z) - z[v]) + z_loss * lse(z)^2

    A mean divides the first two terms by the sum of w[y], as torch does, and the last by the number of counted
    positions. Products run in the dtype of ``hidden``, all else in float32 (float64 for float64); the loss is float32.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64; under autocast it is cast as ``linear`` would.
        weight: (V, H), the dtype of ``hidden``.
        target: (...) int64 entries, or (..., V) probabilities that are not differentiated.
        bias: (V,).
        ignore_index: target of positions that do not count; they are dropped before the product.
        reduction: "mean", "sum" or "none" (zero at ignored positions).
        label_smoothing: e above, 0 to 1.
        class_weight: (V,), not differentiated.
        softcap: bound of the final logits; None or 0 for none.
        logit_scale: a number or a scalar tensor, which gets a gradient.
        z_loss: factor of the squared log-sum-exp.
        shift: the target of position t along the last dimension of ``target`` is ``target[t + shift]``, without
            copies; results per position then have ``shift`` fewer along it.
        return_stats: also return :class:`LossStats`.
        chunk_bytes: scratch for logits; 90 MiB unless given. More scratch means fewer, larger chunks.
        mode: "rows" makes the gradients of a mean or sum in forward, in row chunks. "recompute" leaves the weight's to
            backward, where logits are made once more in slices of the vocabulary, and each of its rows is written once.
            "tiles" (Triton) makes logits in tiles on the chip in forward and twice in backward, and keeps none.
            Gradients of "none" and of the returned log-sum-exp are made in backward in every mode.
        accumulate: how the weight's gradient is made from row chunks. "once": in 16 bits each element is rounded once,
            from all rows; softmax gradients wait in the gradient's own memory, which holds H rows, and in the scratch,
            and logits of further rows are made again (:mod:`memopt.kernels.losses.held_rows`). "weight" adds in the
            weight's dtype, without logits made again but with a rounding per chunk, as "once" does in float32.
            "float32" adds in 4 more bytes per weight element.
        gradient_filter: in mode "tiles", a tile where no probability, nor what is missing to one at a target, is above
            this is taken for zero. 0 skips nothing, else entries are met by falling mean logit; 2**-12 is below what
            bfloat16 resolves. Entries that are rare in the targets lose part of their gradient: meant for fine-tuning.
        process_group: ranks that hold consecutive rows of the weight (and of bias and class_weight) in rank order, with
            the same ``hidden`` and ``target`` everywhere; the gradient of ``hidden`` is summed over them.

    Returns:
        The loss, or the loss and :class:`LossStats`. With nothing to count a mean is NaN and a sum 0, as in torch, and
        gradients are zero.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a choice that is unknown, on a CPU a target outside the
            vocabulary (elsewhere such a row's target logit counts as zero). TypeError: an argument of the wrong type.
        RuntimeError: a second backward through a mean or sum in mode "rows": its gradients were handed over.

    Gradients made in forward are multiplied by the upstream gradient in backward: one that is not a power of two rounds
    them once more.

    Cost: memory beyond inputs and gradients at most ``chunk_bytes``, working space of the product, and 40 bytes per
    position. Time of three products over (N, H, V) and about three passes over the logits, and in 16 bits a fourth for
    the share of rows beyond H + ``chunk_bytes`` / (2 V); four products in "recompute"; four and five where gradients
    are made in backward; five in "tiles", without chunks, but 4 bytes per element of ``hidden``.

    Source: gradients in forward, row chunks and their cost as in the Liger kernels; recomputing as in "Cut Your Losses
    in Large-Vocabulary Language Models" section 4. We differ: chunks by
    bytes, one kernel for all options, one rounding of the weight's gradient without memory for a wider sum.
    """
    scale = check_inputs(hidden, weight, target, bias, class_weight, logit_scale)
    check_group(process_group)
    if shift and target.dim() - target.is_floating_point() == 0:
        raise ValueError("shift needs a sequence dimension, got a single position")
    if process_group is not None and target.is_floating_point():
        raise ValueError("soft targets do not work with process_group; pass int64 targets")
    positions = target.shape[: hidden.dim() - 1]
    settings = Settings(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=0.0 if softcap is None else softcap,
        z_loss=z_loss,
        shift=shift,
        length=positions[-1] if positions else 1,
        want_stats=return_stats,
        chunk_bytes=DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes,
        mode=mode,
        accumulate=accumulate,
        gradient_filter=gradient_filter,
        group=process_group,
    )
    if mode == "tiles":
        check_tiles(hidden, target)
    if (cast := autocast_dtype(hidden.device)) is not None:
        hidden, weight = hidden.to(cast), weight.to(cast)
    hidden = hidden.reshape(-1, weight.shape[1])
    tracked = (hidden, weight, bias, scale)
    wanted = Wanted(*(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tracked))
    if torch.compiler.is_compiling():
        if process_group is not None:
            raise RuntimeError("process_group does not work under torch.compile; call the loss outside of it")
        outputs = linear_cross_entropy_forward(*tracked, target, class_weight, list(wanted), *settings.choices())[:4]
    else:
        call = Call(settings, wanted)
        outputs = _LinearCrossEntropy.apply(*tracked, target, class_weight, call)  # type: ignore[no-untyped-call]
    loss, lse, entropy, accuracy = outputs
    shape = (*positions[:-1], positions[-1] - shift) if shift else positions
    if reduction == "none":
        loss = loss.view(shape)
    return (loss, LossStats(lse[0].view(shape), entropy.view(shape), accuracy)) if return_stats else loss


@dataclass
class Call:
    """One call on its way from forward to backward; it owns the gradients made in forward until they are taken."""

    settings: Settings
    wanted: Wanted
    made: Gradients | None = None

    def take(self) -> Gradients | None:
        """The gradients for an upstream gradient of one, once: whoever takes them may change them in place."""
        made, self.made = self.made, None
        return made


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        with autocast_off(hidden.device):
            problem = prepare(hidden, weight, bias, scale, target, class_weight, call.settings)
            outcome = forward(problem, call.wanted)
        call.made = outcome.gradients
        return outcome.loss, outcome.lse, outcome.entropy, outcome.accuracy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, call = inputs
        ctx.call = call
        ctx.kinds = [None if t is None else (t.dtype, t.shape) for t in tensors[2:4]]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2], output[3])
        if call.wanted.any() and (call.made is None or call.settings.recomputes):
            ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor | None, of_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("linear_cross_entropy")
        if of_loss is None and of_lse is None:
            return (None,) * 7
        call: Call = ctx.call
        made = call.take() if of_lse is None else None
        if made is not None and of_loss is not None:
            made.scale_(of_loss)
        if made is None or (call.settings.mode == "recompute" and call.wanted.weight):
            if not ctx.saved_tensors:
                raise RuntimeError(
                    "linear_cross_entropy made its gradients in forward and has handed them over: backward runs once. "
                    "For a second backward use mode='recompute' or return_stats=True."
                )
            hidden, weight, bias, scale, target, class_weight, lse = ctx.saved_tensors
            with torch.no_grad(), autocast_off(hidden.device):
                problem = prepare(hidden, weight, bias, scale, target, class_weight, call.settings)
                wanted = call.wanted if made is None else Wanted(weight=True)
                again = backward(problem, wanted, lse, of_loss, of_lse)
            if made is None:
                made = again
            else:
                made.weight = again.weight
        return (*made.cast(*ctx.kinds), None, None, None)
