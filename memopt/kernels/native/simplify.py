"""Rewrites a rule's graph so that fewer products remain for every element; results change by roundings only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from memopt.kernels.expr import Expr, make


def rewritten(node: Expr, made: dict[Expr, Expr], positive: list[Expr] | None = None) -> Expr:
    """A copy of a graph in which the host multiplies the uniform factors of each product and factors of 1 are left out;
    itself where nothing changes.

    Args:
        node: the graph's root.
        made: what stands in place of which node; copies are added.
        positive: where given, quotients pass factors on too, which must be above 0 for that and are added to it, and
            roots those that are among them.
    """
    if node not in made:
        args = tuple(rewritten(arg, made, positive) for arg in node.args)
        same = all(a is b for a, b in zip(args, node.args, strict=True))
        copy = node if same else make(node.op, *args, name=node.name)
        if copy.op == "mul" and any(_is_one(arg) for arg in copy.args):
            copy = copy.args[_is_one(copy.args[0])]
        elif _scaled(copy):
            copy = _gathered(copy)
        elif positive is not None:
            copy = _passed_on(copy, positive)
        made[node] = copy
    return made[node]


def units_of(
    roots: Sequence[Expr], states: Mapping[int, Expr], products: Mapping[int, Expr]
) -> dict[int, tuple[Expr, Expr]]:
    """Of new states ``product + u * rest``: the uniform number u and the rest, by the state's number.

    Such a state over u takes a product less, and the scale of its codes can be multiplied by u instead. The product
    must have no other use, and none of the products may be a part of the rest.

    Args:
        roots: all that a step computes.
        states: the new states.
        products: what each takes from its old value.
    """
    users, found = _users(roots), {}
    for j, product in products.items():
        state = states[j]
        if state.op != "add" or len(users[product]) != 1 or product not in state.args:
            continue
        split = _split(state.args[state.args[0] is product])
        if split is not None and not _users([split[1]]).keys() & products.values():
            found[j] = split
    return found


def _users(roots: Sequence[Expr]) -> dict[Expr, list[Expr]]:
    """Every node that differs by element, with the nodes that use it, as often as they do; a root is used by itself."""
    users: dict[Expr, list[Expr]] = defaultdict(list)
    for root in roots:
        users[root].append(root)
    seen, waiting = set[Expr](), list(roots)
    while waiting:
        node = waiting.pop()
        if node not in seen and not node.uniform:
            seen.add(node)
            waiting += node.args
            for arg in node.args:
                users[arg].append(node)
    return users


def scaled_uses(roots: Sequence[Expr], inputs: Mapping[Expr, int]) -> dict[int, Expr]:
    """Of the inputs whose only use is a product with a uniform number: that product, by the input's number.

    Such a state can be decoded times that number, which costs nothing: decoding is linear in a block's scale.
    """
    users = _users(roots)
    return {
        number: users[node][0]
        for node, number in inputs.items()
        if len(users[node]) == 1 and _scaled(users[node][0]) and node not in roots
    }


def uniform_factor(product: Expr) -> Expr:
    """The uniform one of a product's two factors."""
    left, right = product.args
    return left if left.uniform else right


def _passed_on(node: Expr, positive: list[Expr]) -> Expr:
    """sqrt(x * u) as sqrt(x) * sqrt(u) for a positive u; (x * u) / (y * v + w) as x / (y * (v / u) + w / u)."""
    inner = None if node.uniform or node.op not in ("sqrt", "div") else _split(node.args[0])
    if inner is None:
        return node
    number, rest = inner
    if node.op == "sqrt":  # the very nodes, not their values: other factors may be large, or below 0
        return make("sqrt", rest) * make("sqrt", number) if number in positive else node
    denominator = node.args[1]
    if denominator.op != "add" or not denominator.args[1].uniform or not _scaled(denominator.args[0]):
        return node
    product, offset = denominator.args
    factor = uniform_factor(product)
    element = next(arg for arg in product.args if arg is not factor)
    positive.append(number)
    return rest / (element * (factor / number) + offset / number)


def _is_one(node: Expr) -> bool:
    return node.op == "const" and node.value == 1.0


def _split(product: Expr) -> tuple[Expr, Expr] | None:
    """A product's uniform factor and what is left of it."""
    if product.op != "mul" or product.uniform:
        return None
    left, right = product.args
    if left.uniform or right.uniform:
        return (left, right) if left.uniform else (right, left)
    for one, other in ((left, right), (right, left)):
        found = _split(one)
        if found is not None:
            return found[0], found[1] * other if one is left else other * found[1]
    return None


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
