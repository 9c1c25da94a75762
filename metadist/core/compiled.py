"""A pure function of tensors as compiled code for a CPU.

`torch.compile` reads Python's bytecode, so before each call it must check that nothing has changed that this code
looked at. A chunk's computation has fixed sizes and no state: here it is run once on tensors without data, the
operations that it calls are written down (`make_fx`), and torch's compiler, Inductor, turns them into one C++ program
that needs no checks, and no Python between its parts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch._inductor
from torch import Tensor, fx
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from metadist.errors import ModelError, first_line

OPTIONS = {"cpp_wrapper": True}
FACTOR = 16
"""How many times as large a tensor must be into which another is broadcast, so that the smaller one is held."""

_traced: ContextVar[bool] = ContextVar("traced", default=False)


def is_traced() -> bool:
    """Whether operations are being written down for the compiler.

    Some computations are fastest as one of torch's own operators, but compile to faster code as a few simple ones.
    """
    return _traced.get()


@contextmanager
def traced() -> Iterator[None]:
    """What is called here is written down for the compiler."""
    token = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(token)


class Compiled:
    """`function`, compiled at its first call with arguments of other sizes or dtypes; gives no gradients.

    Raises ModelError where what it does depends on the values of tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._codes: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        leaves, structure = pytree.tree_flatten(arguments)
        leaves = [leaf.contiguous() for leaf in leaves]
        sizes = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        with torch.no_grad():
            if sizes not in self._codes:
                self._codes[sizes] = self._compile(leaves, structure)
            return self._codes[sizes](*leaves)

    def _compile(self, leaves: list[Any], structure: Any) -> Callable[..., Any]:
        def of_leaves(*leaves: Tensor) -> Any:
            return self._function(*pytree.tree_unflatten(list(leaves), structure))

        code: Callable[..., Any] = torch._inductor.compile(written_down(of_leaves, leaves), leaves, options=OPTIONS)
        return code


def written_down(function: Callable[..., Any], leaves: Sequence[Tensor]) -> fx.GraphModule:
    """The operations that `function(*leaves)` calls, as the compiler is to have them.

    Raises ModelError where they depend on the values of tensors.
    """
    try:
        with traced():
            graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)
    except (GuardOnDataDependentSymNode, UnsupportedFakeTensorException) as error:
        raise ModelError(
            f"the model cannot be compiled: {type(error).__name__}: {first_line(error)}. Where its code depends on the"
            " values of tensors, use training.compile: false."
        ) from error
    graph.graph.eliminate_dead_code()
    join_products(graph)
    hold_small_factors(graph)
    return graph


def join_products(graph: fx.GraphModule) -> None:
    """Makes `a @ b + c @ d` one product of a beside c and b above d, where its result is larger than all four.

    The sum would be one more pass over the result, which the compiler would not save.
    """
    mm, cat, add = torch.ops.aten.mm.default, torch.ops.aten.cat.default, torch.ops.aten.add.Tensor
    for node in list(graph.graph.nodes):
        terms = node.args if node.target is add and not node.kwargs else ()
        if len(terms) != 2 or any(
            not isinstance(term, fx.Node) or term.target is not mm or len(term.users) > 1 for term in terms
        ):
            continue
        (a, b), (c, d) = (term.args for term in terms)
        if sum(part.meta["val"].numel() for part in (a, b, c, d)) > node.meta["val"].numel():
            continue
        with graph.graph.inserting_before(node):
            left = graph.graph.call_function(cat, ([a, c], 1))
            right = graph.graph.call_function(cat, ([b, d], 0))
            joined = graph.graph.call_function(mm, (left, right))
        for new, axis, parts in ((left, 1, (a, c)), (right, 0, (b, d))):
            new.meta["val"] = torch.cat([part.meta["val"] for part in parts], axis)
        joined.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(joined)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def hold_small_factors(graph: fx.GraphModule) -> None:
    """Has small tensors that are broadcast into large ones computed once, and kept.

    Inductor would write, say, a channel's 1 / sqrt(variance) into the loop over all pixels, and compute it for each.
    What another tensor is a view of, by `as_strided`, it keeps in memory.
    """
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or _is_view(node):
            continue
        if _largest_use(node) >= FACTOR * value.numel():
            with graph.graph.inserting_after(node):
                held = graph.graph.call_function(
                    torch.ops.aten.as_strided.default, (node, list(value.shape), list(value.stride()))
                )
            held.meta["val"] = value
            node.replace_all_uses_with(held, delete_user_cb=lambda user, held=held: user is not held)
    graph.recompile()


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
