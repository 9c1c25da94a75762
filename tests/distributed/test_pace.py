"""When a call is late, by the run's own chunk times."""

import pytest

from metadist.distributed.pace import ENOUGH, FACTOR, FLOOR_S, HISTORY, Pace

ONE, FOUR = 1, 4


def paced(*seconds, unknown_s=120.0):
    pace = Pace(unknown_s)
    for value in seconds:
        pace.note(ONE, value)
    return pace


def test_until_the_pace_is_known_a_call_may_take_as_long_as_a_start():
    pace = paced(*[0.5] * (ENOUGH - 1))
    assert pace.deadline_s(FOUR) == 120.0
    pace.note(FOUR, 2.0)
    assert pace.deadline_s(FOUR) == FACTOR * 0.5 * 4


def test_calls_that_take_no_time_have_that_of_a_busy_machine():
    assert paced(*[1e-4] * ENOUGH).deadline_s(FOUR) == FLOOR_S


@pytest.mark.parametrize("adapters", [2, 3, 8])
def test_one_adapter_that_was_always_twenty_times_slower_is_late(adapters):
    # Every adapter makes as many calls; even half of them being slow leaves the lower quartile with the fast ones.
    pace = paced(*([20.0] + [1.0] * (adapters - 1)) * ENOUGH)
    assert pace.deadline_s(ONE) == FACTOR * 1.0 < 20.0


def test_where_all_become_slower_the_pace_follows():
    pace = paced(*[1.0] * HISTORY)
    for _ in range(HISTORY):
        assert pace.deadline_s(ONE) in (FACTOR * 1.0, FACTOR * 10.0)
        pace.note(ONE, 10.0)
    assert pace.deadline_s(ONE) == FACTOR * 10.0
