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

from metadist.core.rewrites import REWRITES, take_numbers_out
from metadist.errors import ModelError, first_line

OPTIONS: dict[str, Any] = {"cpp_wrapper": True}
COMPUTE_AGAIN = {"realize_reads_threshold": 64, "realize_acc_reads_threshold": 64, "realize_opcount_threshold": 512}
"""Options under which the compiler keeps less in memory between two loops, and computes more of it in both."""
CACHE_BYTES = 1 << 21
"""A core's second-level cache: where tensors are larger, computing them again is faster than reading them."""
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


def held(tensor: Tensor) -> Tensor:
    """`tensor` itself, which the compiler is to keep in memory: it would else write its formula wherever it is read.

    Of what another tensor is a view of by `as_strided`, it keeps all elements, in the usual order.
    """
    return tensor.as_strided(tensor.shape, tensor.stride()) if tensor.is_contiguous() else tensor


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

        graph = written_down(of_leaves, leaves)
        values = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        is_large = max(value.numel() * value.element_size() for value in values) > CACHE_BYTES
        options = OPTIONS | COMPUTE_AGAIN if is_large else OPTIONS
        numbers = take_numbers_out(graph.graph)
        graph.recompile()
        code = torch._inductor.compile(graph, [*leaves, *numbers], options=options)
        return lambda *leaves: code(*leaves, *numbers)


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
    for rewrite in REWRITES:
        rewrite(graph.graph)
        graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
