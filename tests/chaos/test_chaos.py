"""The tier of tests in which everything goes wrong at once: `make chaos`, some twenty minutes."""

import pytest
from rich.console import Console

from tests.chaos.actor_manager import ACTORS, ROUNDS, rounds
from tests.chaos.disturbed_run import CHECKPOINT_EVERY, disturb, three_nodes
from tests.chaos.resume import killed_and_resumed
from tests.chaos.schedule import KINDS, schedule
from tests.chaos.sweep import killed_and_resumed as killed_and_resumed_sweep

pytestmark = pytest.mark.chaos


def test_a_schedule_is_drawn_from_its_seed_alone() -> None:
    assert schedule(3, 300, 68, 10) == schedule(3, 300, 68, 10) != schedule(4, 300, 68, 10)
    assert {kind for _, kind in schedule(3, 300, 68, 10)} == set(KINDS)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_fault_costs_a_bit_and_none_more_than_it_must(seed: int) -> None:
    report = disturb(300, 68, seed, Console(stderr=True))
    assert report.equal_bits
    assert not report.not_injected
    assert sum(report.injected.values()) >= 60
    # A machine that stalls may make a learner look hung as well; it is replaced, and costs no more than a killed one.
    assert report.learners_lost >= report.injected["learner killed"]
    assert report.other_rollbacks == []
    assert report.most_steps_replayed <= CHECKPOINT_EVERY
    assert (report.torn_loaded, report.torn) == (0, report.injected["checkpoint torn"])


def test_forty_of_forty_calls_of_unreliable_actors_give_their_result() -> None:
    with three_nodes():
        outcome = rounds(1, Console(stderr=True))
    assert outcome.good == ACTORS * ROUNDS
    assert outcome.equal_bits
    assert outcome.crashed
    assert outcome.raised


@pytest.mark.parametrize("scheduler", ["asha", "pbt"])
def test_a_sweep_killed_at_ten_random_moments_ends_with_the_table_of_an_undisturbed_one(scheduler: str) -> None:
    outcome = killed_and_resumed_sweep(scheduler, 10, seed=1, console=Console(stderr=True))
    assert outcome.killed == 10
    assert outcome.equal, outcome.table


@pytest.mark.parametrize(("times", "workers"), [(50, 0), (5, 2)])
def test_a_run_killed_at_random_moments_goes_on_with_equal_bits_each_time(times: int, workers: int) -> None:
    outcome = killed_and_resumed(times, seed=1, workers=workers)
    assert outcome.equal == outcome.killed == times
