import heapq

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from metadist.core.keys import TaskKey
from metadist.core.plan import Plan, Range, plan_evaluation, plan_step

plans = st.builds(
    Plan, st.just(3), st.just("train"), st.just(9), num_tasks=st.integers(1, 150), chunk_size=st.integers(1, 20)
)
workers = st.integers(0, 40)


def nodes_of_the_tree(start, stop):
    """All ranges in the tree of the design: the left half is the largest power of two below the length."""
    yield Range(start, stop)
    if stop - start > 1:
        left = max(2**level for level in range(20) if 2**level < stop - start)
        yield from nodes_of_the_tree(start, start + left)
        yield from nodes_of_the_tree(start + left, stop)


def time_to_finish(ranges, num_workers):
    """In chunks, where whoever is free takes the next range."""
    free_at = [0] * max(1, num_workers)
    for start, stop in ranges:
        heapq.heapreplace(free_at, free_at[0] + stop - start)
    return max(free_at)


@given(plans, workers)
def test_ranges_hold_every_chunk_once_and_in_order(plan, num_workers):
    chunks = [chunk for start, stop in plan.ranges(num_workers) for chunk in range(start, stop)]
    assert chunks == list(range(-(-plan.num_tasks // plan.chunk_size)))


@given(plans, workers)
def test_ranges_are_nodes_of_the_tree(plan, num_workers):
    assert set(plan.ranges(num_workers)) <= set(nodes_of_the_tree(0, plan.num_chunks))


@given(plans, workers)
def test_the_size_of_ranges_is_the_largest_of_those_that_finish_soonest(plan, num_workers):
    n = plan.num_chunks
    sizes = [size for size in (2**level for level in range(10)) if size < 2 * n]
    cuts = {size: [Range(start, min(start + size, n)) for start in range(0, n, size)] for size in sizes}
    times = {size: time_to_finish(cut, num_workers) for size, cut in cuts.items()}
    best = max(size for size in sizes if times[size] == min(times.values()))
    assert plan.ranges(num_workers) == cuts[best]


def test_ranges_of_some_plans_by_hand():
    def ranges(num_chunks, num_workers):
        return [tuple(span) for span in Plan(0, "train", 0, num_chunks, 1).ranges(num_workers)]

    assert ranges(5, 1) == [(0, 5)]
    assert ranges(8, 2) == [(0, 4), (4, 8)]
    # 3 + 2 chunks would finish no sooner than 2 + 2 + 1, and 3 chunks are no node of the tree.
    assert ranges(5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert ranges(3, 7) == [(0, 1), (1, 2), (2, 3)]


@given(plans)
def test_every_chunk_is_full_and_only_the_plans_own_tasks_weigh(plan):
    keys = [key for chunk in range(plan.num_chunks) for key in plan.keys(chunk)]
    weights = np.concatenate([plan.weights(chunk) for chunk in range(plan.num_chunks)])
    assert all(len(plan.keys(chunk)) == plan.chunk_size for chunk in range(plan.num_chunks))
    assert weights.dtype == np.float32
    assert keys == [TaskKey(3, "train", 9, task) for task in range(len(weights))]
    assert weights.tolist() == [1.0] * plan.num_tasks + [0.0] * (len(weights) - plan.num_tasks)


def test_a_step_trains_and_an_evaluation_is_the_same_at_any_step():
    assert plan_step(4, 17, 32, 5).keys(1)[0] == TaskKey(4, "train", 17, 5)
    assert plan_evaluation(4, "test", 600, 5).keys(1)[0] == TaskKey(4, "test", 0, 5)
