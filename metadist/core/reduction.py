"""Sums in the order of one fixed binary tree over chunk ids.

Floating-point addition is not associative: `(a + b) + c` and `a + (b + c)` differ in their last bits.
The tree fixes the order once for all: a range of chunks is the sum of its left half and its right
half, where the left half is the largest power of two below its length. Whoever computes an aligned
range has computed one node of that tree, so any division into aligned ranges gives equal bits.
"""

from collections.abc import Callable
from typing import TypeVar

from metadist.core.plan import Range

T = TypeVar("T")


def reduce_tree(span: Range, node: Callable[[Range], T | None], add: Callable[[T, T], T]) -> T:
    """The sum over `span`, in tree order.

    `node(range)` gives the value of a node where it is known and None elsewhere; it must know every
    single chunk, or a node above it.
    """
    value = node(span)
    if value is not None:
        return value
    length = span.stop - span.start
    assert length > 1, f"the reduction was not given chunk {span.start}"
    middle = span.start + (1 << ((length - 1).bit_length() - 1))
    left = reduce_tree(Range(span.start, middle), node, add)
    right = reduce_tree(Range(middle, span.stop), node, add)
    return add(left, right)
