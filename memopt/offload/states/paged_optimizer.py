"""Optimizer states that wait in host memory or on disk and visit the device for their step, bucket by bucket.

The step runs on the device, at its speed; of the states, one bucket is there to be stepped and the next is on its way,
so that the device holds two buckets' states at most instead of all. Every state travels both ways once a step: the step
takes at least twice the states' bytes over the link's bandwidth. Where the device has no room for that, or the link is
slow, ``HostOptimizer`` moves gradients and parameters instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from memopt.offload.states.loading import load_all
from memopt.offload.template import Layout
from memopt.offload.tiers import Slot, open_tier


class _Away:
    """A state in the tier."""

    __slots__ = ("layout", "slot")

    def __init__(self, tensor: Tensor, slot: Slot) -> None:
        self.layout, self.slot = Layout.of(tensor), slot

    def back(self) -> Tensor:
        """The state on its device; the copy in the tier stays."""
        return self.layout.over(self.slot.get().view(self.layout.dtype))


class PagedOptimizer:
    """Steps parameters where they are; their states are elsewhere between the steps.

    Args:
        params: the parameters, in the order in which they are stepped.
        make: builds an optimizer for a bucket's parameters, such as ``lambda p: AdamW(p, lr=1e-4)``. A rule must not
            look at several parameters at once beyond its bucket.
        bucket_bytes: of parameters in a bucket, at most; a larger parameter is a bucket of its own.
        tier: ``"host"`` or ``"disk"``.
        folder: for the disk; by default the folder for temporary files.

    Raises:
        ValueError: no parameters, another tier, or a folder that cannot be used.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        make: Callable[[list[nn.Parameter]], Optimizer],
        *,
        bucket_bytes: int = 64 * 2**20,
        tier: str = "host",
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if tier not in ("host", "disk"):
            raise ValueError(f"tier is {tier!r}; states can wait in 'host' memory or on 'disk'")
        buckets = _buckets([parameter for parameter in params if parameter.requires_grad], bucket_bytes)
        if not buckets:
            raise ValueError("params holds no parameter that requires gradients")
        self.tier = open_tier(tier, folder)
        self.tier.prefetch_bytes = 0  # it would bring back what was put away last: the buckets just stepped
        self._optimizers = [make(bucket) for bucket in buckets]
        start = 0
        for optimizer, bucket in zip(self._optimizers, buckets, strict=True):
            if hasattr(optimizer, "numbering"):  # what it draws must be what it draws for all of them
                optimizer.numbering = {parameter: start + n for n, parameter in enumerate(bucket)}
            start += len(bucket)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all buckets' optimizers, for schedulers that set ``lr`` between steps."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        After an error, the buckets that were stepped have no gradients any more: calling ``step`` again steps the
        others only.

        Args:
            closure: runs forward and backward, as for torch's optimizers.

        Returns:
            What the closure returned.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.tier.new_step()
        stepped = []
        try:
            for number, optimizer in enumerate(self._optimizers):
                if number == 0:
                    self._prefetch(0)
                self._prefetch(number + 1)
                with self._here(optimizer):
                    optimizer.step()
                    stepped.append(optimizer)
        except BaseException:
            for optimizer in stepped:
                optimizer.zero_grad()
            for slot in self._slots(*self._optimizers):
                slot.forget()
            raise
        finally:
            self.tier.block_ended()  # the last bucket has gone
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Every bucket's optimizer state, in host memory; brought back one bucket at a time."""
        found = []
        for optimizer in self._optimizers:
            with self._here(optimizer):
                found.append(pytree.tree_map_only(Tensor, _on_host, optimizer.state_dict()))
        self.tier.block_ended()
        return {"buckets": found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave.

        Raises:
            ValueError: it is for other buckets or another kind of optimizer; nothing is loaded.
        """

        def load(optimizer: Optimizer, part: Any) -> None:
            optimizer.load_state_dict(part)  # the old states are not looked at: they stay away
            self._send_away(optimizer)

        load_all(self._optimizers, state, "buckets", "buckets", load)
        self.tier.block_ended()

    @contextmanager
    def _here(self, optimizer: Optimizer) -> Iterator[None]:
        """A bucket's states are on the device meanwhile, and away again afterwards, whatever happens."""
        try:
            self._bring_back(optimizer)
            yield
        finally:
            self._send_away(optimizer)

    def _prefetch(self, number: int) -> None:
        for slot in self._slots(*self._optimizers[number : number + 1]):
            slot.prefetch()

    @staticmethod
    def _slots(*optimizers: Optimizer) -> Iterator[Slot]:
        """Where the states of buckets lie that are away."""
        for optimizer in optimizers:
            for leaf in pytree.tree_leaves(dict(optimizer.state)):
                if isinstance(leaf, _Away):
                    yield leaf.slot

    def _send_away(self, optimizer: Optimizer) -> None:
        for parameter, stored in list(optimizer.state.items()):
            away = pytree.tree_map_only(Tensor, self._put, stored)
            optimizer.state[parameter] = away
        self.tier.block_ended()  # and the bucket before it has gone

    def _put(self, tensor: Tensor) -> Any:
        if tensor.dim() == 0 or tensor.numel() == 0:
            return tensor  # a counter
        return _Away(tensor, self.tier.put(tensor))

    @staticmethod
    def _bring_back(optimizer: Optimizer) -> None:
        for parameter, stored in list(optimizer.state.items()):
            optimizer.state[parameter] = pytree.tree_map_only(_Away, _Away.back, stored)


def _buckets(params: list[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    found: list[list[nn.Parameter]] = []
    room = 0
    for parameter in params:
        if not found or parameter.nbytes > room:
            found.append([])
            room = most
        found[-1].append(parameter)
        room -= parameter.nbytes
    return found


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
