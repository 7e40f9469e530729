"""The plan against the model: what can be seen when it is applied, and what the first call of each block shows."""

from __future__ import annotations

from typing import Any

from torch import nn

from memopt.offload.errors import PlanMismatchError, UnsupportedBlockError
from memopt.offload.template import Kind, Template
from memopt.planner.values import Action, BlockPlan

_CUDA_ROUNDING = 512


def find_block(model: nn.Module, path: str) -> nn.Module:
    """The module of a path.

    Raises:
        PlanMismatchError: the model has no such module.
        UnsupportedBlockError: its forward is compiled or scripted, so that what it saves cannot be followed.
    """
    try:
        block = model.get_submodule(path)
    except AttributeError:
        near = [name for name, _ in model.named_modules() if name.split(".")[-1] == path.split(".")[-1]][:3]
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


def check_actions(plan: BlockPlan) -> None:
    """Refuse a plan that names a storage twice or out of range."""
    seen: set[int] = set()
    for action in plan.actions:
        if action.index < 0:
            raise PlanMismatchError(f"block {plan.path!r}: the plan has an action for saved storage {action.index}")
        if action.index in seen:
            raise PlanMismatchError(f"block {plan.path!r}: the plan has two actions for saved storage {action.index}")
        if action.fraction != 1.0:
            raise UnsupportedBlockError(
                f"block {plan.path!r}: the plan takes a fraction of {action.fraction} of saved storage {action.index}; "
                "the runtime treats storages whole: plan without fractions, or tile the block (memopt.offload.tile)"
            )
        seen.add(action.index)


def check_call(plan: BlockPlan, template: Template, first: bool) -> None:
    """Compare a recorded call with what the plan was made for; calls of other shapes later on are not compared.

    Raises:
        PlanMismatchError: the message says what differs.
    """
    where = f"block {plan.path!r} (call {plan.call})"
    if first:
        count = len(template.saved)
        for action in plan.actions:
            if action.action is Action.KEEP:
                continue
            if action.index >= count:
                raise PlanMismatchError(
                    f"{where}: the plan has an action for saved storage {action.index}, but this call saves only "
                    f"{count}; plan again with the inputs and settings that you train with"
                )
            size = template.sizes[template.saved[action.index]]
            rounded = -(-size // _CUDA_ROUNDING) * _CUDA_ROUNDING
            if action.bytes and action.bytes not in (size, rounded):
                raise PlanMismatchError(
                    f"{where}: saved storage {action.index} has {size} bytes, the plan was made for "
                    f"{action.bytes}; plan again with the shapes and the dtype that you train with"
                )
        if plan.signature and plan.signature != template.signature:
            raise PlanMismatchError(
                f"{where}: its operations ({len(template.ops)}, signature {template.signature}) are not those that "
                f"the plan was made for (signature {plan.signature}); plan again with the inputs, shapes, dtype and "
                "training mode that you train with"
            )
    written = [s for s in template.mutated_outside if template.kinds[s] is Kind.PARAMETER]
    if written and any(action.action is Action.RECOMPUTE for action in plan.actions):
        raise UnsupportedBlockError(
            f"{where}: its forward overwrites one of its parameters, so that nothing in it can be recomputed; leave "
            "the block out of the plan"
        )


def missing_fields(plan: Any) -> list[str]:
    """What an object lacks to be a plan."""
    return [name for name in ("blocks", "swap_tier") if not hasattr(plan, name)]
