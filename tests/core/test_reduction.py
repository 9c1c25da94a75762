import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.core.plan import Plan, Range
from metadist.core.reduction import reduce_tree


def add(left, right):
    return left + right


def uneven_numbers(count, seed=0):
    """float32 `[count, 16]` of very different sizes and signs, so that the order of a sum shows in its bits."""
    random = np.random.default_rng(seed)
    return (random.standard_normal((count, 16)) * 10.0 ** random.integers(-4, 4, (count, 16))).astype(np.float32)


def tree_sum(span, numbers):
    return reduce_tree(span, lambda node: numbers[node.start] if node.stop - node.start == 1 else None, add)


def expression(count):
    """The order of additions over `count` chunks, in brackets."""
    return reduce_tree(
        Range(0, count),
        lambda node: "abcdefgh"[node.start] if node.stop - node.start == 1 else None,
        lambda left, right: f"({left}{right})",
    )


@st.composite
def aligned_partitions(draw):
    """A number of chunks and nodes of the tree that hold each of them once."""
    count = draw(st.integers(1, 40))

    def cut(span):
        length = span.stop - span.start
        if length == 1 or draw(st.booleans()):
            return [span]
        left = max(2**level for level in range(7) if 2**level < length)
        return cut(Range(span.start, span.start + left)) + cut(Range(span.start + left, span.stop))

    return count, cut(Range(0, count))


def test_the_order_of_additions_is_that_of_the_fixed_tree():
    # The left half is the largest power of two below the length.
    assert [expression(count) for count in range(1, 9)] == [
        "a",
        "(ab)",
        "((ab)c)",
        "((ab)(cd))",
        "(((ab)(cd))e)",
        "(((ab)(cd))(ef))",
        "(((ab)(cd))((ef)g))",
        "(((ab)(cd))((ef)(gh)))",
    ]


@given(aligned_partitions(), st.integers(0, 2**32 - 1))
def test_any_division_into_aligned_ranges_gives_equal_bits(partition, seed):
    count, spans = partition
    numbers = uneven_numbers(count, seed)
    parts = {span: tree_sum(span, numbers) for span in spans}
    whole = tree_sum(Range(0, count), numbers)
    assert reduce_tree(Range(0, count), parts.get, add).tobytes() == whole.tobytes()


@given(st.integers(1, 60), st.integers(1, 64))
def test_any_number_of_workers_gives_equal_bits(num_chunks, num_workers):
    numbers = uneven_numbers(num_chunks)
    spans = Plan(0, "train", 0, num_chunks, 1).ranges(num_workers)
    parts = {span: tree_sum(span, numbers) for span in spans}
    whole = tree_sum(Range(0, num_chunks), numbers)
    assert reduce_tree(Range(0, num_chunks), parts.get, add).tobytes() == whole.tobytes()


def test_a_sum_from_left_to_right_would_depend_on_the_division():
    # 2**-24 is half of float32's spacing above 1, so 1 + 2**-24 is 1; two of them together are not lost.
    numbers = np.array([1, 2**-24, 2**-24, 2**-24], np.float32)
    one_worker = ((numbers[0] + numbers[1]) + numbers[2]) + numbers[3]
    two_workers = (numbers[0] + numbers[1]) + (numbers[2] + numbers[3])
    assert (float(one_worker), float(two_workers)) == (1.0, 1 + 2**-23)
    assert float(tree_sum(Range(0, 4), numbers)) == 1 + 2**-23


def test_a_missing_chunk_is_no_zero():
    parts = {Range(0, 2): 1.0, Range(3, 4): 1.0}
    with pytest.raises(AssertionError, match="not given chunk 2"):
        reduce_tree(Range(0, 4), parts.get, add)
