"""The fingerprint by which a plan and the running model recognise the same block.

The trace (fake tensors) and the runtime (real tensors) both reduce a call of a block to a sequence of entries, one per
dispatched operation, and hash it. What differs between devices without changing what the block computes is left out:
operations that only hand out another name for a tensor, the secondary outputs of normalisations and attention, and
which of the attention kernels was taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

Entry = tuple[str, tuple[int, ...], str]

# Autograd makes some of these a second time after a write to a view, on fake tensors only.
_NAMES_ONLY = frozenset(
    {
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "expand",
        "lift",
        "lift_fresh",
        "lift_fresh_copy",
        "permute",
        "reshape",
        "_reshape_alias",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "_unsafe_view",
        "view",
    }
)
_ATTENTION = "_scaled_dot_product_"


def describe(name: str, output: Any) -> Entry | None:
    """Reduces one dispatched operation to (name, shape, dtype) of its first tensor output.

    Args:
        name: the operator's name, as in ``func._schema.name`` ("aten::mm") or ``str(func)`` ("aten.mm.default").
        output: what the operator returned: a tensor, a tuple or list of tensors, or anything else.

    Returns:
        The entry, or None where the operation leaves no trace in the signature.
    """
    short = name.replace("aten::", "").replace("aten.", "").split(".")[0]
    if short in _NAMES_ONLY:
        return None
    if short.startswith(_ATTENTION):
        short = "scaled_dot_product_attention"
    first = output
    while isinstance(first, (tuple, list)):
        if not first:
            return None
        first = first[0]
    if not isinstance(first, torch.Tensor):
        return None
    return short, tuple(int(size) for size in first.shape), str(first.dtype).removeprefix("torch.")


def block_signature(entries: Iterable[Entry | None]) -> str:
    """Hashes a block call's entries, in the order in which they ran, to 16 hexadecimal digits.

    Equal sequences give equal signatures on every machine and in every run.

    Args:
        entries: of the operations; those that are None are passed over.
    """
    digest = hashlib.blake2b(digest_size=8)
    for entry in entries:
        if entry is not None:
            name, shape, dtype = entry
            digest.update(f"{name}:{','.join(map(str, shape))}:{dtype};".encode())
    return digest.hexdigest()
