"""Rewrites a rule's graph so that fewer products remain for every element; results change by roundings only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memopt.kernels.expr import Expr, make


def rewritten(node: Expr, made: dict[Expr, Expr]) -> Expr:
    """A copy of a graph in which the host multiplies the uniform factors of each product; itself where nothing changes.

    Args:
        node: the graph's root.
        made: what stands in place of which node; copies are added.
    """
    if node not in made:
        args = tuple(rewritten(arg, made) for arg in node.args)
        same = all(a is b for a, b in zip(args, node.args, strict=True))
        copy = node if same else make(node.op, *args, name=node.name)
        made[node] = _gathered(copy) if _scaled(copy) else copy
    return made[node]


def scaled_uses(roots: Sequence[Expr], inputs: Mapping[Expr, int]) -> dict[int, Expr]:
    """Of the inputs whose only use is a product with a uniform number: that product, by the input's number.

    Such a state can be decoded times that number, which costs nothing: decoding is linear in a block's scale.
    """
    users: dict[Expr, list[Expr]] = {node: [] for node in inputs}
    seen, waiting = set[Expr](), list(roots)
    while waiting:
        node = waiting.pop()
        if node in seen or node.uniform:
            continue
        seen.add(node)
        waiting += node.args
        for arg in node.args:
            if arg in users:
                users[arg].append(node)
    return {
        inputs[node]: used[0]
        for node, used in users.items()
        if len(used) == 1 and _scaled(used[0]) and node not in roots
    }


def uniform_factor(product: Expr) -> Expr:
    """The uniform one of a product's two factors."""
    left, right = product.args
    return left if left.uniform else right


def _scaled(node: Expr) -> bool:
    """Whether this is the product of an element and a uniform number."""
    return node.op == "mul" and not node.uniform and any(arg.uniform for arg in node.args)


def _gathered(product: Expr) -> Expr:
    """u * ((x * w) * (y * v)) as (x * uwv) * y."""
    numbers, factors, waiting = list[Expr](), list[Expr](), [product]
    while waiting:
        node = waiting.pop()
        if node.uniform:
            numbers.append(node)
        elif _scaled(node) or (node.op == "mul" and any(_scaled(arg) for arg in node.args)):
            waiting += reversed(node.args)
        else:
            factors.append(node)
    if len(numbers) < 2:
        return product
    number, gathered = numbers[0], factors[0]
    for other in numbers[1:]:
        number = number * other
    gathered = gathered * number
    for factor in factors[1:]:
        gathered = gathered * factor
    return gathered
