"""Finds the blocks of a model: the parts that block-coordinate training visits one after the other.

A block is one of several sibling modules that repeat: the members of a ``ModuleList`` or ``Sequential`` (the layers of
a transformer) or, where there is no such list below their parent, siblings of one class. The outermost such family
wins: a transformer layer is a block, not its linear maps. What lies outside every family (embeddings before the layers,
norm and head after them) forms blocks of its own, one per unbroken run of modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """A set of parameters that is trained together.

    Args:
        name: the module's name, or the first one's where the block has several.
        names: the parameters' names in the model.
        params: the parameters.
    """

    name: str
    names: tuple[str, ...]
    params: tuple[Tensor, ...]

    @property
    def numel(self) -> int:
        """Elements over all parameters (of the whole tensors, where they are sharded)."""
        return sum(p.numel() for p in self.params)


def check_sizes(position: Mapping[str, Any], blocks: Sequence[Block]) -> None:
    """Refuse a coverage's position that was taken with other blocks.

    Raises:
        ValueError: ``position["sizes"]`` is not the blocks' numbers of elements.
    """
    sizes = [block.numel for block in blocks]
    if position["sizes"] != sizes:
        raise ValueError(f"it has blocks of {position['sizes']} elements, this optimizer of {sizes}")


def _has_trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _members(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if _has_trainable(child)]


def _holds_list_family(module: nn.Module) -> bool:
    return any(isinstance(m, _LISTS) and len(_members(m)) > 1 for m in module.modules())


def _family(module: nn.Module) -> list[nn.Module]:
    """The children of ``module`` that are blocks; none where it has no repeated children."""
    members = _members(module)
    if isinstance(module, _LISTS) and len(members) > 1:
        return [m for m in members if not isinstance(m, _LISTS)]
    if _holds_list_family(module):
        return []
    kinds = Counter(type(m) for m in members if not isinstance(m, _LISTS))
    return [m for m in members if kinds[type(m)] > 1]


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """The model cut into (name, module, is a block), in order; what is no block stands for its own parameters only."""
    family = set(map(id, _family(module)))
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        yield prefix, module, False
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if id(child) in family:
            yield path, child, True
        else:
            yield from _parts(child, path)


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model by its module structure, in the order in which modules were defined.

    Only parameters that require gradients are taken, and a parameter shared by several modules belongs to the first
    block that holds it. Where nothing repeats, every module with parameters of its own is a block.

    Raises:
        ValueError: no parameter of the model requires gradients.

    >>> [b.name for b in find_blocks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 3))]
    ['layers.0', 'layers.1', 'layers.2']
    """
    names = {id(p): name for name, p in model.named_parameters()}
    parts = list(_parts(model, ""))
    repeats = any(is_block for _, _, is_block in parts)
    seen: set[int] = set()
    blocks: list[tuple[str, list[Tensor]]] = []
    run_open = False
    for path, module, is_block in parts:
        params: list[Tensor] = [p for p in module.parameters(recurse=is_block) if p.requires_grad and id(p) not in seen]
        if not params:
            continue
        seen.update(map(id, params))
        if not is_block and run_open and repeats:
            blocks[-1][1].extend(params)
        else:
            blocks.append((path, params))
        run_open = not is_block
    if not blocks:
        raise ValueError("the model has no parameter that requires gradients; nothing can be trained")
    return [Block(path or "model", tuple(names[id(p)] for p in params), tuple(params)) for path, params in blocks]


def _named(item: str, named: Mapping[str, Tensor]) -> list[Tensor]:
    found = [p for name, p in named.items() if name == item or name.startswith(f"{item}.")]
    if not found:
        raise ValueError(f"blocks names {item!r}, but no parameter or module with parameters to train is called so")
    return found


def _resolve(item: object, named: Mapping[str, Tensor]) -> list[Tensor]:
    if isinstance(item, str):
        return _named(item, named)
    if isinstance(item, nn.Module):
        return [p for p in item.parameters() if p.requires_grad]
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, Iterable):
        return [p for one in item for p in _resolve(one, named)]
    raise TypeError(f"blocks holds a {type(item).__name__}; it takes parameters, modules, names, or lists of them")


def given_blocks(blocks: Sequence[object], named: Mapping[str, Tensor]) -> list[Block]:
    """Blocks as a user gave them.

    Args:
        blocks: one entry per block: a parameter, a module, a name of either, or a list of these. Blocks may overlap:
            a parameter is then trained with each of them.
        named: every parameter to be trained by its name.

    Raises:
        ValueError: a name or parameter that is not to be trained, a block without any, or a parameter in no block.
        TypeError: an entry of another type.
    """
    if not isinstance(blocks, Sequence):
        raise TypeError(f"blocks is {blocks!r}; it must be 'auto' or a list with one entry per block")
    if not len(blocks):
        raise ValueError("blocks is empty; list at least one block")
    names = {id(p): name for name, p in named.items()}
    result = []
    for number, item in enumerate(blocks):
        params = list({id(p): p for p in _resolve(item, named)}.values())
        if not params:
            raise ValueError(f"block {number} of blocks has no parameter that requires gradients")
        strangers = [tuple(p.shape) for p in params if id(p) not in names]
        if strangers:
            raise ValueError(
                f"block {number} of blocks holds a parameter of shape {strangers[0]} that the optimizer does not have"
            )
        own = tuple(names[id(p)] for p in params)
        result.append(Block(item if isinstance(item, str) else own[0], own, tuple(params)))
    covered = {id(p) for block in result for p in block.params}
    missing = [name for name, p in named.items() if id(p) not in covered]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{len(missing)} parameters are in no block ({shown}); add them to one, or set requires_grad to False for "
            "what is not to be trained"
        )
    return result
