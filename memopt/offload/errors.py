"""What can go wrong while a plan is applied or carried out."""

from __future__ import annotations


class PlanMismatchError(ValueError):
    """The plan was made for something else; the message names the block and what differs. The plan has been removed."""


class UnsupportedBlockError(ValueError):
    """The plan asks for something that cannot be carried out exactly on this block; nothing has been applied."""


class ReplayError(RuntimeError):
    """A block did not do in backward what it did in forward, so its dropped values cannot be brought back."""


class SwapError(RuntimeError):
    """A swap tier failed; the message names the tier and what to change."""
