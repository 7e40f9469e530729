"""``memopt.fuse_loss``: a language model computes its loss without its logits, whatever its architecture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from memopt.integrations import lazy_rules  # noqa: F401 - registers what lazy logits can do without their values
from memopt.integrations.lazy_logits import lazy_logits
from memopt.integrations.lora_head import is_lora, lora_product
from memopt.kernels.losses.checks import DTYPES, autocast_dtype

_ATTRIBUTE = "_memopt_fused_loss"
_OPTIONS = ("accumulate", "chunk_bytes", "gradient_filter", "mode")
_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_DATA_PARALLEL = (
    "fuse_loss does not work under DataParallel, whose copies of the model live for one forward; use "
    "DistributedDataParallel, or remove() the handle"
)


class LazyHead:
    """The ``forward`` of an output head while its model is fused: lazy logits where that is possible."""

    def __init__(self, head: nn.Module, options: dict[str, Any]) -> None:
        self.head, self.options = head, options
        self._told = False

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The head's product of ``hidden`` (..., H): logits (..., V)."""
        product = None
        if not (args or kwargs or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None):
            product = self._product(hidden)
        if product is None:
            return type(self.head).forward(self.head, hidden, *args, **kwargs)  # type: ignore[no-any-return]
        return lazy_logits(*product, self.options)

    def _product(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What the logits are the product of, as autocast would have it; None where they must be made in whole."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        base: Any = self.head
        if is_lora(base):
            found = lora_product(base, hidden)
            if found is None:
                return None
            hidden, weight, bias = found
        else:
            weight, bias = base.weight, base.bias
        if type(weight) not in _PLAIN or hasattr(weight, "ds_id"):
            self._tell("partitioned by DeepSpeed" if hasattr(weight, "ds_id") else f"a {type(weight).__name__}")
            return None
        if (cast := autocast_dtype(hidden.device)) is not None:
            hidden, weight, bias = hidden.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
        fits = hidden.dtype == weight.dtype and hidden.dtype in DTYPES and hidden.shape[-1:] == weight.shape[1:]
        return (hidden, weight, bias) if fits and hidden.device == weight.device else None

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            text = f"fuse_loss: the output head makes all logits after all, because its weight is {what}"
            warnings.warn(text, stacklevel=4)


class FusedLoss:
    """A fused ``model``; ``remove()`` makes it what it was, as does leaving a ``with`` block.

    :func:`fuse_loss` makes it; ``head`` and ``options`` are what it was given.
    """

    def __init__(self, model: nn.Module, head: str | nn.Module | None, options: dict[str, Any]) -> None:
        self.model, self.head, self.options = model, head, options
        self._fused: list[nn.Module] = []
        self._install()
        self._hook = model.register_forward_pre_hook(self._install)
        setattr(model, _ATTRIBUTE, self)

    def _install(self, model: nn.Module | None = None, *_: Any) -> None:
        """Called before every forward as well: adapters, resized embeddings and the like replace the head."""
        if torch.compiler.is_compiling():
            return
        if getattr(model, "_is_replica", False):
            raise ValueError(_DATA_PARALLEL)
        heads = list(_linear_heads(_find_head(self.model, self.head)))
        for head in heads:
            _check_free(head)
        for head in self._fused:
            if not any(head is other for other in heads):
                _uncover(head)
        for head in heads:
            _cover(head, self.options)
        self._fused = heads

    def remove(self) -> None:
        """Give the head its own forward back. Logits that are not computed yet still can be. Safe to repeat."""
        if self.model.__dict__.pop(_ATTRIBUTE, None) is None:
            return
        self._hook.remove()
        for head in self._fused:
            _uncover(head)
        self._fused = []

    def __enter__(self) -> FusedLoss:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def fuse_loss(model: nn.Module, *, head: str | nn.Module | None = None, **options: Any) -> FusedLoss:
    """Have a language model compute its loss without its logits; nothing else about it changes.

    The output head returns logits that are not there yet. Where ``F.cross_entropy`` gets them, in the model's own loss
    or in yours, after casts, slices, reshapes, factors and softcaps, ``memopt.linear_cross_entropy`` works on the
    hidden states instead. Anything else that touches them, such as ``out.logits.argmax(-1)``, computes ordinary logits,
    bitwise those of the model by itself. Works for every transformers model with a linear output head, before or after
    PEFT wraps it, and with autocast, gradient checkpointing, gradient accumulation, DDP and ``memopt.apply``.

    Args:
        model: a transformers model, wrapped by PEFT or DDP or not; or any module with ``head``.
        head: the output head, a linear layer, or its path in the model; None: what ``get_output_embeddings()`` says.
        options: for :func:`memopt.linear_cross_entropy`: ``chunk_bytes``, ``mode``, ``accumulate``,
            ``gradient_filter``. A loss whose backward runs twice needs ``mode="recompute"``.

    Returns:
        A handle with ``remove()``; also a context manager. A second call returns the same handle, with new options.

    Raises:
        ValueError: the model has no linear output head, someone else has replaced its forward, or the model is
            compiled or under DataParallel; nothing has changed.
        TypeError: an argument of the wrong type, or an unknown option.

    Cost: per step at most ``chunk_bytes`` of logits instead of about four tensors of tokens x vocabulary; a LoRA
    adapter on the head costs a copy of the head's weight. Logits that are read cost what they always do.

    We differ from the model by itself: the loss is computed from unrounded products of the head (see
    ``linear_cross_entropy``), which in 16 bits is closer to the exact one. Logits that were never read cannot be read
    after the optimizer's step. Under torch.compile, tensor parallelism, DeepSpeed ZeRO 3 and for a quantised head all
    logits are made, as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise TypeError(f"fuse_loss has no option {', '.join(unknown)}; it passes on {', '.join(_OPTIONS)}")
    inner = _unwrapped(model)
    present: FusedLoss | None = inner.__dict__.get(_ATTRIBUTE)
    if present is not None and (head is None or head is present.head):
        present.options.update(options)
        return present
    if present is not None:
        raise ValueError("the model is fused with another head already; call remove() on that handle first")
    return FusedLoss(inner, head, dict(options))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP's and PEFT's wrappers."""
    while True:
        inner = model
        if isinstance(model, nn.DataParallel):
            raise ValueError(_DATA_PARALLEL)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            raise ValueError(
                "fuse_loss works in eager mode only: under torch.compile the head makes all logits; give it the model "
                "before torch.compile, and run that"
            )
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is model:
            return model
        model = inner


def _find_head(model: nn.Module, head: str | nn.Module | None) -> nn.Module:
    name = type(model).__name__
    if isinstance(head, str):
        try:
            named: nn.Module = model.get_submodule(head)
            return named
        except AttributeError:
            raise ValueError(f"head is {head!r}, but {name} has no module of that name") from None
    if isinstance(head, nn.Module):
        return head
    if head is not None:
        raise TypeError(f"head must be a module, its path in the model, or None, not {type(head).__name__}")
    ask = getattr(model, "get_output_embeddings", None)
    found = ask() if callable(ask) else None
    if not isinstance(found, nn.Module):
        lacking = "says it has no output head" if callable(ask) else "has no get_output_embeddings()"
        raise ValueError(f"{name} {lacking}, so there is no loss to fuse; give the linear layer as head=")
    return found


def _linear_heads(head: nn.Module) -> Iterator[nn.Module]:
    """The layers that may compute the logits: the head itself, or those between which a PEFT wrapper chooses."""
    saved: Any = getattr(head, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):
        yield from (layer for copy in (head.original_module, *saved.values()) for layer in _linear_heads(copy))  # type: ignore[arg-type]
        return
    if not is_lora(head) and type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the output head is a {type(head).__module__}.{type(head).__name__}, not a linear layer whose product "
            "fuse_loss knows"
        )
    yield head


def _slot(head: nn.Module) -> str:
    """Where the head's forward is looked up: accelerate's hooks keep it aside and call it from there."""
    return "_old_forward" if "_old_forward" in head.__dict__ and "_hf_hook" in head.__dict__ else "forward"


def _check_free(head: nn.Module) -> None:
    present = head.__dict__.get("forward")
    if present is not None and not isinstance(present, LazyHead) and _slot(head) == "forward":
        raise ValueError(
            f"the forward of the output head has been replaced by {getattr(present, '__qualname__', present)!r}; undo "
            "that before fuse_loss, or apply it after"
        )


def _cover(head: nn.Module, options: dict[str, Any]) -> None:
    slot = _slot(head)
    present = head.__dict__.get(slot)
    if not isinstance(present, LazyHead):
        head.__dict__[slot] = LazyHead(head, options)


def _uncover(head: nn.Module) -> None:
    for slot in ("forward", "_old_forward"):
        if isinstance(head.__dict__.get(slot), LazyHead):
            if slot == "forward":
                del head.__dict__[slot]
            else:
                head.__dict__[slot] = type(head).forward.__get__(head)
