"""Where the loss is in a training step: which storages are logits and loss, and when their gradients come.

Three signs tell: operations that only losses are made of, wherever they run; memopt's own losses, with all that runs
inside their kernels; and the outermost model's outputs, which the loss reads and whose gradients end its backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memopt.planner.tracking.records import Record, claim, tensors_in
from memopt.planner.values import Category, Phase

if TYPE_CHECKING:
    from memopt.planner.tracking.tracker import StorageTracker

_LOSS_OPERATIONS = frozenset(
    {
        "aten::_log_softmax",
        "aten::_log_softmax_backward_data",
        "aten::nll_loss_forward",
        "aten::nll_loss_backward",
        "aten::nll_loss2d_forward",
        "aten::nll_loss2d_backward",
        "aten::mse_loss",
        "aten::mse_loss_backward",
        "aten::smooth_l1_loss",
        "aten::smooth_l1_loss_backward",
        "aten::huber_loss",
        "aten::huber_loss_backward",
        "aten::binary_cross_entropy",
        "aten::binary_cross_entropy_backward",
        "aten::binary_cross_entropy_with_logits",
    }
)
_FIRST_IS_LOGITS = frozenset(
    {
        "aten::_log_softmax",
        "memopt::logit_statistics",
        "memopt::softmax_gradient_",
        "memopt::column_statistics_",
        "memopt::pair_gradient_",
    }
)
_OWN = "memopt"
_OWN_WORDS = ("cross_entropy", "contrastive", "logit", "softmax_gradient", "column_statistics", "pair_gradient")


def is_own_loss(name: str) -> bool:
    """Whether an operation is one of memopt's losses or a part of one: all that runs inside it is logits and loss."""
    return _OWN in name and any(word in name for word in _OWN_WORDS)


class LossFinder:
    """Claims logits and loss among a tracker's storages, and writes down when their gradients are complete."""

    def __init__(self, tracker: StorageTracker) -> None:
        self._tracker = tracker
        self._hooks: list[Any] = []
        self._outputs: list[Record] = []
        self._left_at = 0

    def remove(self) -> None:
        """Takes every hook away."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def model_entered(self) -> None:
        """An outermost model begins: what ran since the last one was no loss if no backward has followed it."""
        phases = self._tracker.history.phases
        if Phase.BACKWARD not in phases[self._left_at :]:
            for index in range(self._left_at, len(phases)):
                phases[index] = Phase.FORWARD if phases[index] is Phase.LOSS else phases[index]
        self.remove()
        self._outputs = []

    def model_left(self, output: Any) -> None:
        """An outermost model has ended: backward of the loss ends where the gradients of its outputs arrive."""
        self._left_at = self._tracker.clock
        for tensor in _loose_tensors(output):
            if tensor.is_floating_point() and tensor.dim() > 0 and tensor.requires_grad and not tensor.is_leaf:
                self._hooks.append(tensor.register_hook(self._gradient_arrived))  # type: ignore[no-untyped-call]
                record = self._tracker.observe(tensor)
                if record is not None:
                    self._outputs.append(record)

    def backward_started(self) -> None:
        """Backward begins: the model's outputs were what the loss was made of."""
        self._tracker.history.backward_starts.append(self._tracker.clock)
        for record in self._outputs:
            claim(record, Category.LOGITS)
        self._outputs = []

    def operation_ran(self, func: Any, args: Any, output: Any) -> None:
        """An operation has run: the inputs and outputs of loss functions, wherever they run, are logits and loss."""
        name = func._schema.name
        if name in _LOSS_OPERATIONS or name in _FIRST_IS_LOGITS:
            inputs = (args[0],) if name in _FIRST_IS_LOGITS else ()
            for tensor in tensors_in((inputs, output)):
                record = self._tracker.observe(tensor)
                if record is not None and record.producer is not None:
                    claim(record, Category.LOGITS)

    def _gradient_arrived(self, gradient: Tensor) -> None:
        history = self._tracker.history
        starts = history.backward_starts
        if starts and (not history.logit_gradients or history.logit_gradients[-1][0] != starts[-1]):
            history.logit_gradients.append((starts[-1], self._tracker.clock))
        self._tracker.adopt(gradient, Category.LOGITS)


def _loose_tensors(output: Any) -> Iterator[Tensor]:
    """Tensors of a model's output, also inside the output classes of transformers (ordered dicts)."""
    return tensors_in(dict(output) if hasattr(output, "keys") else output)
