"""The plan against the model: what can be seen when it is applied, and what the first call of each block shows."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from memopt.offload.errors import PlanMismatchError, UnsupportedBlockError
from memopt.offload.template import Kind, Template
from memopt.planner.values import Action, BlockPlan, StorageAction

_ROUNDING = 512
_REPLICAS = "which runs copies that a plan cannot follow; use torch.nn.parallel.DistributedDataParallel"
_FIELDS = {"actions": "saved storage", "inputs": "saved input"}


def find_block(model: nn.Module, path: str) -> nn.Module:
    """The module of a path.

    Raises:
        PlanMismatchError: the model has no such module.
        UnsupportedBlockError: its forward is compiled or scripted, so that what it saves cannot be followed.
    """
    try:
        block = model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules()]
        near = [name for name in names if name.endswith(f".{path}")]
        near = (near or [name for name in names if name.split(".")[-1] == path.split(".")[-1]])[:3]
        hint = f"; the model has {', '.join(near)}" if near else ""
        raise PlanMismatchError(
            f"the plan is for a block {path!r}, which {type(model).__name__} lacks{hint}: plan again for this model"
        ) from None
    for name, module in block.named_modules():
        where = f"{path}.{name}".strip(".")
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            raise UnsupportedBlockError(
                f"block {where!r} is compiled by torch.compile, which decides itself what to save; leave "
                "it out of the plan"
            )
        if type(module).__module__.startswith("torch.jit"):
            raise UnsupportedBlockError(f"block {where!r} is a TorchScript module, whose code cannot be replayed")
    return block


def check_plan(model: nn.Module, plan: Any) -> None:
    """Refuse a plan under which nothing fits, and a model that runs as copies of itself; warn of blocks left out.

    Raises:
        PlanMismatchError: the plan is infeasible.
        UnsupportedBlockError: the model is, or holds, a ``torch.nn.DataParallel``.

    Warns:
        UserWarning: beside planned blocks there are others of their class that the plan does not know.
    """
    if getattr(plan, "smallest_budget_bytes", None) is not None and not plan.blocks:
        raise PlanMismatchError(
            f"the plan is infeasible: nothing fits its budget of {plan.budget_bytes} bytes, so that it has no actions; "
            f"plan again with a budget of at least {plan.smallest_budget_bytes} bytes"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise UnsupportedBlockError(f"module {name!r} is a torch.nn.DataParallel, {_REPLICAS}")
    if hasattr(plan, "model_signature"):
        _warn_of_others(model, list(dict.fromkeys(part.path for part in plan.blocks)))


def refuse_replica(model: nn.Module) -> None:
    """Refuse a copy that ``torch.nn.DataParallel`` has made of a planned model.

    Raises:
        UnsupportedBlockError: it is one.
    """
    if getattr(model, "_is_replica", False):
        raise UnsupportedBlockError(f"{type(model).__name__} runs inside a torch.nn.DataParallel, {_REPLICAS}")


def _warn_of_others(model: nn.Module, paths: list[str]) -> None:
    for parent in sorted({path.rpartition(".")[0] for path in paths}):
        planned = {name: find_block(model, path) for path in paths if (name := _child(path, parent)) is not None}
        kinds = {type(block) for block in planned.values()}
        others = [
            f"{parent}.{name}".strip(".")
            for name, module in model.get_submodule(parent).named_children()
            if type(module) in kinds and name not in planned and any(p.requires_grad for p in module.parameters())
        ]
        if others:
            warnings.warn(
                f"the plan does not know {', '.join(others)}, of the same class as blocks that it is for; they run "
                "without a plan. Was it made for a model with fewer layers?",
                stacklevel=4,
            )


def _child(path: str, parent: str) -> str | None:
    before, _, name = path.rpartition(".")
    return name if before == parent else None


def check_actions(plan: BlockPlan) -> None:
    """Refuse a plan that names a storage twice or out of range, or splits it as cannot be done."""
    where = f"block {plan.path!r}"
    for field in _FIELDS:
        whole_actions(plan, field)
    for action in plan.inputs:
        if action.action not in (Action.KEEP, Action.SWAP):
            raise UnsupportedBlockError(
                f"{where}: the plan has action {action.action.value!r} for saved input {action.index}; inputs can be "
                "kept or swapped"
            )


def whole_actions(plan: BlockPlan, field: str) -> dict[int, StorageAction]:
    """One action for each storage that a plan names in ``actions`` or ``inputs``: a swapped and a kept share are one.

    Raises:
        PlanMismatchError: a storage is named twice, or its shares do not add up to 1.
        UnsupportedBlockError: a share of a storage is to be recomputed or compressed.
    """
    where, what = f"block {plan.path!r}", _FIELDS[field]
    found: dict[int, list[StorageAction]] = {}
    for action in getattr(plan, field):
        if action.index < 0:
            raise PlanMismatchError(f"{where}: the plan has an action for {what} {action.index}")
        found.setdefault(action.index, []).append(action)
    for index, parts in found.items():
        shares = {part.action: part.fraction for part in parts}
        if len(shares) < len(parts) or (len(parts) > 1 and all(part.fraction == 1 for part in parts)):
            raise PlanMismatchError(f"{where}: the plan has two actions for {what} {index}")
        partly = {action for action, share in shares.items() if share != 1} - {Action.KEEP, Action.SWAP}
        if partly:
            raise UnsupportedBlockError(
                f"{where}: the plan would {min(partly).value} a fraction of {shares[min(partly)]} of {what} {index}; "
                "only swapping can take a part of a storage: run the block in tiles (memopt.offload.tile) and plan "
                "each tile whole, or plan without fractions"
            )
        if not all(0 < share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
            text = " and ".join(f"{action.value} {share}" for action, share in shares.items())
            raise PlanMismatchError(f"{where}: the shares of {what} {index} ({text}) do not add up to 1")
    return {index: max(parts, key=lambda part: part.action is Action.SWAP) for index, parts in found.items()}


def check_call(plan: BlockPlan, template: Template, first: bool) -> None:
    """Compare a recorded call with what the plan was made for; calls of other shapes later on are not compared.

    Raises:
        PlanMismatchError: the message says what differs.
    """
    where = f"block {plan.path!r} (call {plan.call})"
    if first:
        _check_storages(where, "saved storage", plan.actions, [template.sizes[s] for s in template.saved])
        _check_storages(where, "saved input", plan.inputs, [template.sizes[s] for s in template.saved_inputs])
        if plan.signature and plan.signature != template.signature:
            raise PlanMismatchError(
                f"{where}: its operations ({len(template.ops)}, signature {template.signature}) are not those that "
                f"the plan was made for (signature {plan.signature}); "
                + (
                    "make the plan before any engine is made, with the shapes, dtype and training mode that you "
                    'train with, and set "memory_efficient_linear": false in DeepSpeed\'s "zero_optimization": it puts '
                    "other operations into linear layers"
                    if template.owners
                    else "plan again with the inputs, shapes, dtype and training mode that you train with"
                )
            )
    written = [s for s in template.mutated_outside if template.kinds[s] is Kind.PARAMETER]
    if written and any(action.action is Action.RECOMPUTE for action in plan.actions):
        raise UnsupportedBlockError(
            f"{where}: its forward overwrites one of its parameters, so that nothing in it can be recomputed; leave "
            "the block out of the plan"
        )


def _check_storages(where: str, what: str, actions: tuple[StorageAction, ...], sizes: list[int]) -> None:
    for action in actions:
        if action.action is Action.KEEP:
            continue
        if action.index >= len(sizes):
            raise PlanMismatchError(
                f"{where}: the plan has an action for {what} {action.index}, but this call saves only {len(sizes)}; "
                "plan again with the inputs and settings that you train with"
            )
        size = sizes[action.index]
        if action.bytes and _rounded(action.bytes) != _rounded(size):
            raise PlanMismatchError(
                f"{where}: {what} {action.index} has {size} bytes, the plan was made for {action.bytes}; plan again "
                "with the shapes and the dtype that you train with"
            )


def _rounded(size: int) -> int:
    """What an allocator takes: a trace may know the few statistics of a norm in another precision."""
    return -(-size // _ROUNDING)


def missing_fields(plan: Any) -> list[str]:
    """What an object lacks to be a plan."""
    return [name for name in ("blocks", "swap_tier") if not hasattr(plan, name)]
