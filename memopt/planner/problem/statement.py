"""The policy problem as plain values: what may happen to each saved storage, what that holds, when, and what it costs.

Times are operation indices of the trace. A *span* ``(start, stop, bytes)`` says that so many bytes are resident before
operation ``stop`` from operation ``start`` on. Every variable of the program has a number: the choices of all items
(one of each item's choices is taken) and the *resources* that several choices share (an operation that must be replayed
for two of them, an input that must stay alive), each taken when one of its choices is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memopt.planner.devices import Rates
from memopt.planner.values import Action

Span = tuple[int, int, int]


@dataclass(frozen=True)
class Choice:
    """One thing that may happen to an item: ``variable`` is 1 when it does.

    ``held_bytes`` stay resident between the block's forward and backward; ``swap_bytes`` go to the tier, from
    ``swap_lead_seconds`` before the end of the block's forward on, and come back; ``seconds`` are what it costs beside
    its shared ``needs``; ``feeds`` says that a replay may read the item. A ``fraction`` below 1 keeps the rest.
    """

    variable: int
    action: Action
    format: str | None
    spans: tuple[Span, ...]
    held_bytes: int
    swap_bytes: int
    swap_lead_seconds: float
    seconds: float
    needs: tuple[int, ...]
    feeds: bool
    fraction: float = 1.0


@dataclass(frozen=True)
class Item:
    """A saved storage whose fate the policy decides; ``readers`` are the items whose replay reads it.

    ``index`` counts the block's own saved storages and, after them, its saved inputs. Backward needs the item at
    ``first_need``; its own replay takes ``replay_bytes`` for values that are not saved.
    """

    index: int
    bytes: int
    token_wise: bool
    choices: tuple[Choice, ...]
    readers: tuple[int, ...]
    first_need: int
    replay_bytes: int


@dataclass(frozen=True)
class Resource:
    """Something that several choices share: an operation to replay (``seconds``), bytes that they hold (``spans``).

    Of those ``held_bytes`` are there all the time between the block's forward and backward.
    """

    variable: int
    seconds: float
    spans: tuple[Span, ...]
    held_bytes: int = 0


@dataclass(frozen=True)
class Together:
    """Resource ``variable`` is taken when each of the groups has a variable that is, and when resource ``after`` is."""

    variable: int
    groups: tuple[tuple[int, ...], ...]
    after: int | None


@dataclass(frozen=True)
class Moments:
    """A block call's forward end, when its swaps have left, when they start to return, and its backward start."""

    forward_stop: int
    leave: int
    arrive: int
    backward_start: int


@dataclass(frozen=True)
class BlockItems:
    """The decisions in one block call: ``block`` is its place in the trace, ``group`` its kind.

    In the ``quiet`` span of operations it holds the held bytes of what is taken and nothing else.
    """

    block: int
    group: int
    items: tuple[Item, ...]
    resources: tuple[Resource, ...]
    together: tuple[Together, ...]
    moments: Moments
    quiet: tuple[int, int]


@dataclass(frozen=True)
class Position:
    """A moment at which memory must fit: ``fixed_bytes`` + what blocks ``quiet[0]`` to ``quiet[1]`` hold + the terms.

    ``terms`` are (variable, bytes) of the blocks that are at work; ``most_bytes`` is the total of the largest choices.
    """

    time: int
    label: str
    fixed_bytes: int
    quiet: tuple[int, int]
    terms: tuple[tuple[int, int], ...]
    most_bytes: int


@dataclass(frozen=True)
class Milestone:
    """A moment of the step between two of which ``seconds`` of compute pass; a block's swaps refer to them."""

    time: int
    seconds: float


@dataclass(frozen=True)
class Problem:
    """Everything the policy program needs; comparable and free of tensors.

    It holds all positions that can matter under some budget; ``within`` picks those that can under one.
    """

    blocks: tuple[BlockItems, ...]
    positions: tuple[Position, ...]
    milestones: tuple[Milestone, ...]
    rates: Rates
    budget_bytes: int
    compute_seconds: float
    variables: int

    def within(self, budget_bytes: int) -> Problem:
        """The same problem under another budget."""
        binding = tuple(position for position in self.positions if position.most_bytes > budget_bytes)
        return replace(self, budget_bytes=budget_bytes, positions=binding)


def held_at(spans: tuple[Span, ...], time: int) -> int:
    """Bytes that spans hold at an operation."""
    return sum(size for start, stop, size in spans if start <= time < stop)
