"""What is changed in the operations of a function before torch's compiler gets them: the same values, sooner.

Each takes a graph as `make_fx` gives it, whose nodes have the tensors that they give, without data, under "val".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

MM, BMM = torch.ops.aten.mm.default, torch.ops.aten.bmm.default
ADD, MUL = torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor
FACTOR = 16
"""How many times as large a tensor must be into which another is broadcast, so that the smaller one is held."""


def join_products(graph: fx.Graph) -> None:
    """Makes `a @ b + c @ d` one product of a beside c and b above d, where its result is larger than all four.

    The sum would be one more pass over the result, which the compiler would not save.
    """

    def joined(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.cat([a, c], 1) @ torch.cat([b, d], 0)

    for node in list(graph.nodes):
        terms: Any = node.args if node.target is ADD and not node.kwargs else ()
        if len(terms) == 2 and all(isinstance(t, fx.Node) and t.target is MM and len(t.users) == 1 for t in terms):
            factors = [factor for term in terms for factor in term.args]
            if sum(_value(factor).numel() for factor in factors) < _value(node).numel():
                _replace(graph, node, joined, factors)


def multiply_thin_products_out(graph: fx.Graph) -> None:
    """Makes products of matrices of which one has a single row or column multiplications, and maybe a sum.

    The compiler joins these with what is around them; calling a library for so little takes longer.
    """
    for node in list(graph.nodes):
        if node.target not in (MM, BMM):
            continue
        factors: Any = node.args
        (rows, inner), columns = _value(factors[0]).shape[-2:], _value(factors[1]).shape[-1]
        if inner == 1:
            _replace(graph, node, torch.mul, factors)
        elif columns == 1:
            _replace(graph, node, lambda a, b: (a * b.mT).sum(-1, keepdim=True), factors)
        elif rows == 1:
            _replace(graph, node, lambda a, b: (a.mT * b).sum(-2, keepdim=True), factors)


def hold_small_factors(graph: fx.Graph) -> None:
    """Has small tensors that are broadcast into large ones computed once, and kept.

    The compiler would write, say, a channel's 1 / sqrt(variance) into the loop over all pixels, and compute it for
    each. What another tensor is a view of by `as_strided`, it keeps in memory.
    """
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or _is_view(node) or not value.is_contiguous():
            continue
        if _largest_use(node) >= FACTOR * value.numel():
            with graph.inserting_after(node):
                arguments = (node, list(value.shape), list(value.stride()))
                held = graph.call_function(torch.ops.aten.as_strided.default, arguments)
            held.meta["val"] = value
            node.replace_all_uses_with(held, delete_user_cb=lambda user, held=held: user is not held)


def take_numbers_out(graph: fx.Graph) -> list[Tensor]:
    """Makes inputs, after the others, of the numbers that tensors are multiplied by; returns these numbers.

    Computations that differ in a learning rate are then the same to the compiler, which keeps what it compiled. Each
    number has the dtype of what it is multiplied with, as the compiler would write it, so that the bits stay the same.
    """
    inputs: dict[tuple[float, torch.dtype], fx.Node] = {}
    (*_, last) = (node for node in graph.nodes if node.op == "placeholder")
    for node in graph.nodes:
        if node.target is not MUL or not isinstance(node.args[1], float):
            continue
        tensor, number = node.args
        if (dtype := _value(tensor).dtype) not in (torch.float32, torch.float64):
            continue  # Numbers of fewer bits are multiplied as float32, and then rounded.
        if (number, dtype) not in inputs:
            with graph.inserting_after(last):
                last = graph.placeholder(f"number_{len(inputs)}")
            last.meta["val"] = _value(tensor).new_empty(())
            inputs[number, dtype] = last
        node.args = (tensor, inputs[number, dtype])
    return [torch.tensor(number, dtype=dtype) for number, dtype in inputs]


REWRITES = (join_products, multiply_thin_products_out, hold_small_factors)


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _replace(graph: fx.Graph, node: fx.Node, function: Callable[..., Tensor], arguments: list[fx.Node]) -> None:
    """Puts the operations of `function(*arguments)` in the place of `node`."""
    inserted = make_fx(function)(*map(_value, arguments)).graph
    copied: dict[fx.Node, Any] = dict(
        zip((part for part in inserted.nodes if part.op == "placeholder"), arguments, strict=True)
    )
    with graph.inserting_before(node):
        for part in inserted.nodes:
            if part.op == "call_function":
                copied[part] = graph.node_copy(part, copied.__getitem__)
    (result,) = inserted.output_node().all_input_nodes
    node.replace_all_uses_with(copied[result])


def _largest_use(node: fx.Node) -> int:
    """Elements of the largest tensor that `node`, or a view of it, goes into."""
    found = 0
    for user in node.users:
        value = user.meta.get("val")
        size = value.numel() if isinstance(value, Tensor) else 0
        found = max(found, size, _largest_use(user) if _is_view(user) else 0)
    return found


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)
