import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metadist.core.plan import Range
from metadist.distributed.ledger import MAX_CRASHES, Ledger
from metadist.errors import AdapterError

FIRST, SECOND, THIRD = RANGES = [Range(0, 4), Range(4, 8), Range(8, 10)]


class AnyScheduleOfTrouble(RuleBasedStateMachine):
    """Adapters take ranges, finish, raise and die in any order; results of dead ones may still come in late."""

    @initialize(count=st.integers(1, 6))
    def start(self, count):
        self.ranges = [Range(2 * number, 2 * number + 2) for number in range(count)]
        self.ledger = Ledger("step 812", self.ranges)
        self.fresh, self.reopened = list(self.ranges), set()
        self.held = {}
        self.late = []
        self.finished = dict.fromkeys(self.ranges, 0)
        self.raised, self.divided = set(), set()
        self.crashes = dict.fromkeys(self.ranges, 0)
        self.num_reopened = 0

    def open_again(self, span):
        self.reopened.add(span)
        self.num_reopened += span.stop - span.start

    @rule(adapter=st.integers(0, 3))
    def an_adapter_takes_a_range(self, adapter):
        span = self.ledger.submit(adapter)
        if span is None:
            assert not self.fresh
            assert not self.reopened
            return
        assert not self.finished[span], "a range that is done is handed out"
        assert span not in self.held, "a range is with two adapters"
        if self.reopened:
            assert span in self.reopened, "a lost range waits behind one that nobody needs sooner"
            self.reopened.remove(span)
        else:
            assert span == self.fresh.pop(0)
        self.held[span] = {adapter}

    @precondition(lambda self: self.held)
    @rule(data=st.data(), adapter=st.integers(0, 3))
    def a_late_range_is_given_to_another_adapter_too(self, data, adapter):
        span = data.draw(st.sampled_from(sorted(self.held)))
        assume(adapter not in self.held[span])
        self.ledger.submit_again(span, adapter)
        self.held[span].add(adapter)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def an_adapter_finishes(self, data):
        self.note_result(data.draw(st.sampled_from(sorted(self.held))))

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def a_late_result_comes_in(self, data):
        self.note_result(data.draw(st.sampled_from(self.late)))

    def note_result(self, span):
        if span in self.divided:
            assert not self.ledger.done(span)
            return
        assert self.ledger.done(span) == (not self.finished[span]), "a duplicate is taken, or a result is dropped"
        self.finished[span] += not self.finished[span]
        self.held.pop(span, None)
        self.reopened.discard(span)

    @rule(adapter=st.integers(0, 3))
    def an_adapter_dies(self, adapter):
        touched = [span for span, holders in self.held.items() if adapter in holders]
        # Beyond that the range itself is taken to be the cause, which has a test of its own.
        assume(all(self.crashes[span] < MAX_CRASHES - 1 for span in touched))
        lost = [span for span in touched if self.held[span] == {adapter}]
        assert sorted(self.ledger.lost(adapter)) == sorted(lost), "not exactly its unfinished ranges are lost"
        for span in touched:
            self.held[span].remove(adapter)
            self.crashes[span] += 1
        for span in lost:
            del self.held[span]
            self.open_again(span)
        self.late += touched

    @precondition(lambda self: set(self.held) - self.raised)
    @rule(data=st.data())
    def a_range_raises_once(self, data):
        span = data.draw(st.sampled_from(sorted(set(self.held) - self.raised)))
        self.ledger.failed(span, ValueError(f"flaky {len(self.raised)}"))
        self.raised.add(span)
        del self.held[span]
        if span.stop - span.start == 1:
            self.open_again(span)
            return
        # Its chunks are tried one by one, and may raise once more each.
        self.late.append(span)
        self.divided.add(span)
        del self.finished[span]
        for chunk in chunks_of(span):
            self.finished[chunk] = self.crashes[chunk] = 0
            self.open_again(chunk)

    @invariant()
    def it_is_complete_when_every_range_is_done(self):
        if hasattr(self, "ledger"):
            assert self.ledger.complete == all(self.finished.values())
            assert self.ledger.chunks_lost == self.num_reopened

    def teardown(self):
        if not hasattr(self, "ledger"):
            return
        for span in list(self.held):
            self.note_result(span)
        for _ in range(2 * len(self.ranges)):
            span = self.ledger.submit("the last one")
            if span is not None:
                self.held[span] = {"the last one"}
                self.note_result(span)
        assert self.ledger.complete
        assert set(self.finished.values()) == {1}


AnyScheduleOfTrouble.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_every_range_is_done_once_under_any_schedule_of_trouble = AnyScheduleOfTrouble.TestCase


def started():
    """A ledger of three ranges, all of them with the adapter "a"."""
    ledger = Ledger("step 812", RANGES)
    assert [ledger.submit("a") for _ in range(4)] == [*RANGES, None]
    return ledger


def test_only_what_a_dead_adapter_had_not_finished_is_handed_out_again():
    ledger = Ledger("step 812", RANGES)
    assert [ledger.submit(adapter) for adapter in "aba"] == RANGES
    assert ledger.done(FIRST)
    assert ledger.lost("a") == [THIRD]
    assert ledger.submit("c") == THIRD
    assert ledger.submit("c") is None
    assert ledger.chunks_lost == 2


def test_a_range_that_two_adapters_have_is_lost_with_the_second_of_them():
    ledger = started()
    ledger.submit_again(SECOND, "b")
    assert sorted(ledger.lost("a")) == [FIRST, THIRD]
    assert ledger.lost("b") == [SECOND]
    assert ledger.done(SECOND)
    assert not ledger.done(SECOND)


def test_a_range_that_brings_down_one_adapter_after_the_other_stops_the_run():
    ledger = started()
    for span in (FIRST, THIRD):
        ledger.done(span)
    for crash in range(1, MAX_CRASHES):
        assert ledger.lost("a") == [SECOND], crash
        assert ledger.submit("a") == SECOND
    with pytest.raises(AdapterError, match=rf"step 812: {MAX_CRASHES} adapters died .* chunks 4 to 7\."):
        ledger.lost("a")


def test_a_result_of_a_range_given_up_for_lost_spares_doing_it_again():
    ledger = started()
    ledger.lost("a")
    assert ledger.done(SECOND)
    assert {ledger.submit("b"), ledger.submit("b")} == {FIRST, THIRD}
    assert ledger.submit("b") is None


def test_the_same_error_twice_is_raised_itself():
    ledger = started()
    ledger.failed(SECOND, ValueError("no such class in chunk 5"))
    assert [ledger.submit("b") for _ in range(5)] == [*chunks_of(SECOND), None]
    again = ValueError("no such class in chunk 5")
    with pytest.raises(ValueError, match="no such class") as caught:
        ledger.failed(Range(5, 6), again)
    assert caught.value is again


def test_two_errors_of_one_range_raise_an_error_that_names_step_and_chunks():
    ledger = started()
    ledger.failed(SECOND, ValueError("no such class"))
    ledger.failed(Range(6, 7), ValueError("no such file"))
    last = OSError("disk on fire")
    with pytest.raises(AdapterError, match=r"step 812: chunks 6 to 6 failed twice: disk on fire") as caught:
        ledger.failed(Range(6, 7), last)
    assert caught.value.__cause__ is last


def test_each_range_has_another_chance_of_its_own():
    ledger = started()
    for span in RANGES:
        ledger.failed(span, ValueError("flaky"))
    chunks = [chunk for span in RANGES for chunk in chunks_of(span)]
    assert sorted(ledger.submit("b") for _ in chunks) == chunks
    assert all(ledger.done(chunk) for chunk in chunks)
    assert ledger.complete


def test_an_error_of_a_range_that_is_done_already_is_dropped():
    ledger = started()
    ledger.submit_again(FIRST, "b")
    assert ledger.done(FIRST)
    ledger.failed(FIRST, ValueError("flaky"))
    assert ledger.submit("b") is None


def test_the_error_and_the_result_of_a_range_that_was_divided_are_dropped():
    ledger = started()
    ledger.submit_again(SECOND, "b")
    ledger.failed(SECOND, ValueError("flaky"))
    ledger.failed(SECOND, ValueError("flaky"))
    assert not ledger.done(SECOND)
    assert [ledger.submit("b") for _ in range(5)] == [*chunks_of(SECOND), None]


def chunks_of(span):
    return [Range(chunk, chunk + 1) for chunk in range(*span)]
