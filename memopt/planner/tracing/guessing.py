"""What a trace does where a model looks at the values of its tensors.

Fake tensors have shapes and no contents, yet some models ask: which rows went to which expert, is anything masked, how
many labels count. Small integer and boolean tensors therefore carry a real *shadow* through the trace: user inputs that
are real keep their values, everything computed from shadows alone is computed on the shadows too, and a choice among
fake values (``topk``, ``argmax``, ``sort``) is answered by an even spread, so that routing is traced as balanced.
Where there is no shadow a number read out of a tensor is harmless: 1.0 for floating-point, 0 for integers, False for
booleans, except that everything is taken to be true of ``all``, and a mask selects everything.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from memopt.planner.naming import users_line
from memopt.planner.tracing.flops import mutated
from memopt.planner.tracking import tensors_in

_LIMIT = 1 << 22
"""Elements above which a tensor carries no shadow."""

_ENTRY = str(Path(__file__).with_name("step.py"))
"""Where the trace begins to run the user's code."""

_CHOICES = {"topk": 1, "sort": 1, "argsort": 0, "argmax": 0, "argmin": 0, "max": 1, "min": 1, "multinomial": 0}
"""Operations that choose among values, and which of their outputs holds the indices."""

_aten = torch.ops.aten
_GROUPED = _aten._grouped_mm.default


class Guesses(TorchDispatchMode):
    """Answers the questions that fake tensors cannot; to be active right above the fake mode.

    Args:
        mode: the fake mode.
        fake: from a real tensor to the fake one that stands for it, where the model writes to a real one.
    """

    def __init__(self, mode: FakeTensorMode, fake: Callable[[Tensor], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode, self._fake = mode, fake
        self._shadows = WeakIdKeyDictionary()
        self.guessed_at: dict[str, None] = {}  # lines of the user's that got a number without a shadow, in order

    def remember(self, fake: Any, real: Any) -> None:
        """Gives the integer and boolean tensors in ``fake`` the values of those in ``real``, of the same structure."""
        for one, other in zip(tree_flatten(fake)[0], tree_flatten(real)[0], strict=True):
            if isinstance(other, Tensor) and not other.is_meta and not other.is_floating_point():
                self._keep(one, other.detach().cpu().clone())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            args, kwargs = tree_map(self._without_real, (args, kwargs))
        shadow = self._on_shadows(func, args, kwargs)
        try:
            output = self._grouped(*args, **kwargs) if func is _GROUPED else func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            output = self._guess(func, args, kwargs, shadow)
        if shadow is not None:
            for fake, real in zip(tree_flatten(output)[0], tree_flatten(shadow)[0], strict=False):
                self._keep(fake, real)
        elif func._schema.name.split("::")[-1] in _CHOICES:
            self._spread(func, args, kwargs, output)
        elif func._schema.name == "aten::all":
            with _disable_current_modes():
                self._shadows[output] = torch.ones(output.shape, dtype=torch.bool)
        return output

    def _without_real(self, value: Any) -> Any:
        return self._fake(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value

    def _keep(self, fake: Any, real: Any) -> None:
        if isinstance(fake, Tensor) and isinstance(real, Tensor):
            if real.numel() <= _LIMIT and real.shape == fake.shape:
                self._shadows[fake] = real
            else:
                self._forget(fake)

    def _forget(self, fake: Tensor) -> None:
        if fake in self._shadows:
            del self._shadows[fake]

    def _on_shadows(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation's result on shadows, or None where an operand has none or the result would be large."""
        written = mutated(func, args, kwargs)
        tensors = list(tensors_in((args, kwargs), 4))
        if any(self._value(one) is None for one in tensors) or any(one not in self._shadows for one in written):
            for tensor in written:
                self._forget(tensor)
            return None
        if not tensors and not _makes_integers(func, args, kwargs):
            return None
        flat, shape = tree_flatten((args, kwargs))
        values = [self._value(value) if isinstance(value, Tensor) else value for value in flat]
        values = [torch.device("cpu") if isinstance(value, torch.device) else value for value in values]
        real_args, real_kwargs = tree_unflatten(values, shape)
        with _disable_current_modes():
            try:
                return func(*real_args, **real_kwargs)
            except RuntimeError:
                return None

    def _value(self, tensor: Tensor) -> Tensor | None:
        """A tensor's shadow; a real tensor of integers (a label that the loss function closes over) is its own."""
        if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.is_floating_point():
            found: Tensor | None = self._shadows.get(tensor)  # type: ignore[no-untyped-call]
            return found
        with _disable_current_modes():
            return tensor.cpu() if tensor.numel() <= _LIMIT else None

    def _guess(self, func: Any, args: Any, kwargs: Any, shadow: Any) -> Any:
        if shadow is not None:
            return tree_map(self._like, shadow)
        name = func._schema.name.split("::")[-1]
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal") and (
            where := users_line(sys._getframe(), _ENTRY)
        ):
            self.guessed_at[where] = None
        if name in ("_local_scalar_dense", "item"):
            return _number(args[0].dtype)
        if name in ("is_nonzero", "equal"):
            return False
        if func is _aten.nonzero.default:
            everything = torch.ones(args[0].shape, dtype=torch.bool, device="meta")
            return self._mode_empty((everything.numel(), everything.dim()), torch.int64, args[0])
        if func is _aten.index.Tensor:
            return func(args[0], [part for index in args[1] for part in self._positions(index)])
        if func is _aten.masked_select.default:
            values, mask = args
            both = torch.broadcast_tensors(values, mask)  # type: ignore[no-untyped-call]
            repeats = both[0].numel() // max(1, mask.numel())
            return self._mode_empty((self._count(mask) * repeats,), values.dtype, values)
        raise DynamicOutputShapeException(func)

    def _positions(self, index: Tensor | None) -> list[Tensor | None]:
        """An index tensor as integer indices: a mask becomes one tensor of positions for each of its dimensions."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        count = self._count(index)
        return [self._mode_empty((count,), torch.int64, index) for _ in range(index.dim())]

    def _count(self, mask: Tensor) -> int:
        """How many elements a mask selects; all of them where that cannot be known."""
        shadow = self._value(mask)
        with _disable_current_modes():
            return mask.numel() if shadow is None else int(shadow.count_nonzero())

    def _grouped(self, a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **others: Any) -> Tensor:
        """The result of ``_grouped_mm``, whose own fake version takes bfloat16 alone."""
        if offs is None:
            shape: tuple[int, ...] = (a.shape[0], a.shape[1], b.shape[2])
        elif a.dim() == 2 and b.dim() == 2:
            shape = (offs.shape[0], a.shape[0], b.shape[1])
        else:
            shape = (a.shape[-2], b.shape[-1])
        return self._mode_empty(shape, others.get("out_dtype") or a.dtype, a)

    def _mode_empty(self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        with self._mode:
            return torch.empty(shape, dtype=dtype, device=like.device)

    def _like(self, real: Any) -> Any:
        if not isinstance(real, Tensor):
            return real
        with self._mode:
            return torch.empty(real.shape, dtype=real.dtype)

    def _spread(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Row r of a choice of k among n gets the indices r * k, r * k + 1, ... modulo n."""
        name = func._schema.name.split("::")[-1]
        indices = output[_CHOICES[name]] if isinstance(output, (tuple, list)) else output
        if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.numel() > _LIMIT:
            return
        source = args[0]
        dim = _dimension(func, args, kwargs)
        if dim is None or source.dim() == 0:
            return
        among = source.shape[dim]
        kept = indices.dim() == source.dim()
        rows_shape = list(indices.shape)
        chosen = rows_shape.pop(dim) if kept else 1
        with _disable_current_modes():
            flat = torch.arange(math.prod(rows_shape) * chosen) % max(1, among)
            shadow = flat.view(*rows_shape, chosen)
            self._shadows[indices] = shadow.movedim(-1, dim).contiguous() if kept else shadow.squeeze(-1)


def _dimension(func: Any, args: Any, kwargs: Any) -> int | None:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            value = args[position] if position < len(args) else kwargs.get("dim", argument.default_value)
            return value % max(1, args[0].dim()) if isinstance(value, int) else None
    return args[0].dim() - 1 if func._schema.name == "aten::multinomial" else None


def _makes_integers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation without tensor operands makes a small tensor of integers or booleans."""
    if not any("Tensor" in str(result.type) for result in func._schema.returns):
        return False
    dtype = kwargs.get("dtype")
    if dtype is None:
        numbers = [value for value in tree_flatten(args)[0] if isinstance(value, (int, float))]
        whole = func._schema.name.split("::")[-1] in ("arange", "randperm", "randint") or any(
            isinstance(value, bool) for value in numbers
        )
        if not whole or any(isinstance(value, float) for value in numbers):
            return False
    elif dtype.is_floating_point or dtype.is_complex:
        return False
    sizes = [value for value in tree_flatten(args)[0] if isinstance(value, int)]
    return math.prod(max(1, size) for size in sizes) <= _LIMIT


def _number(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 0
