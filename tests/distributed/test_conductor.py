"""The conductor as a plain object: calls reach every rank of the group that is there, and of no other."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from metadist.distributed.conductor import Conductor
from metadist.errors import LearnerLostError, RanksResizedError

WAIT_S = 30


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_an_answer_holds_the_replies_by_rank_once_all_are_there(threads: ThreadPoolExecutor) -> None:
    conductor = Conductor()
    group = conductor.enter(2)
    assert conductor.group(after=0) == (group, 2)
    answer = threads.submit(conductor.ask, group, "score", 5)
    number, *call = conductor.next(group, 0)
    assert call == ["score", (5,)]
    conductor.reply(group, number, 1, "b")
    # Neither an earlier call's reply nor an earlier group's is one of this call.
    conductor.reply(group, number - 1, 0, "stale")
    conductor.reply(group - 1, number, 0, "stale")
    conductor.reply(group, number, 0, "a")
    assert answer.result(WAIT_S) == ["a", "b"]


def test_a_new_group_takes_no_call_of_the_one_before(threads: ThreadPoolExecutor) -> None:
    conductor = Conductor()
    first = conductor.enter(1)
    answer = threads.submit(conductor.ask, first, "step")
    conductor.next(first, 0)
    second = conductor.enter(1)
    assert isinstance(answer.result(WAIT_S), RanksResizedError)
    call = threads.submit(conductor.next, second, 0)
    assert not wait([call], timeout=0.1).done
    threads.submit(conductor.ask, second, "prepare")
    number, method, _ = call.result(WAIT_S)
    assert method == "prepare"
    conductor.reply(second, number, 0, None)
    # A rank of the first group that is still there is to end.
    assert conductor.next(first, 0) is None


def test_a_lost_group_answers_with_the_reason_until_another_is_there(threads: ThreadPoolExecutor) -> None:
    conductor = Conductor()
    group = conductor.enter(3)
    answer = threads.submit(conductor.ask, group, "step")
    conductor.next(group, 0)
    conductor.lost("rank 2 died: out of memory", 1)
    for error in (answer.result(WAIT_S), conductor.ask(group, "step")):
        assert isinstance(error, LearnerLostError)
        assert not isinstance(error, RanksResizedError)
        assert str(error) == "rank 2 died: out of memory"
    assert conductor.ranks_lost() == 1
    coming = threads.submit(conductor.group, group)
    conductor.enter(2)
    assert coming.result(WAIT_S) == (group + 1, 2)


def test_closing_ends_the_ranks_that_wait(threads: ThreadPoolExecutor) -> None:
    conductor = Conductor()
    group = conductor.enter(1)
    waiting = threads.submit(conductor.next, group, 0)
    conductor.close()
    assert waiting.result(WAIT_S) is None
    assert conductor.next(group, 0) is None
