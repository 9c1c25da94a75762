"""Sums that adapters add up before the learner takes them: the same bits, wherever they meet and whatever is lost."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from metadist.core.plan import Plan, Range
from metadist.core.reduction import reduce_tree
from metadist.distributed import combining
from metadist.distributed.actors import AdapterActor, LearnerActor, SumsLost, fetched
from metadist.distributed.combining import as_handed_out, next_level
from metadist.distributed.ledger import Ledger
from metadist.distributed.pace import ENOUGH, FACTOR, Pace
from metadist.distributed.receipt import Receipt
from metadist.distributed.remote_learner import RemoteLearner
from metadist.distributed.work import Call, Slot, Work
from metadist.training import Result
from tests.distributed.faulty import is_first
from tests.distributed.test_same_bits import bits, fit, sinusoid


def plan_of(chunks: int) -> Plan:
    return Plan(0, "train", 0, num_tasks=chunks, chunk_size=1)


@given(st.integers(1, 200), st.integers(1, 40), st.lists(st.integers(0, 5), min_size=200, max_size=200), st.data())
def test_level_by_level_the_sums_are_those_of_the_tree_to_the_bit_wherever_they_lie(
    chunks: int, workers: int, places: list[int], data: st.DataObject
) -> None:
    plan = plan_of(chunks)
    values = np.random.default_rng(chunks).normal(size=chunks).astype(np.float32)
    whole = Range(0, chunks)

    def of_chunk(span: Range) -> np.float32 | None:
        return values[span.start] if span.stop - span.start == 1 else None

    handed_out = plan.ranges(workers)
    # As after an error: one of the ranges was done chunk by chunk.
    broken = data.draw(st.sampled_from(handed_out))
    spans = [span for span in handed_out if span != broken]
    spans += [Range(chunk, chunk + 1) for chunk in range(broken.start, broken.stop)]
    sums = {span: reduce_tree(span, of_chunk, np.add) for span in spans}
    nodes = {span: str(places[span.start]) for span in spans}
    for _ in range(10):
        if len(sums) == 1:
            break
        groups = next_level(plan, nodes)
        assert len(groups) < len(sums)
        sums = {
            span: reduce_tree(span, {part: sums[part] for part in parts}.get, np.add) for span, parts in groups.items()
        }
        nodes = {span: nodes[parts[0]] for span, parts in groups.items()}
    assert sums == {whole: reduce_tree(whole, of_chunk, np.add)}


def test_sums_of_one_node_meet_first_and_no_link_carries_more_than_one_a_level() -> None:
    plan = plan_of(32)
    # Four nodes with eight adapters each.
    nodes = {span: f"node {span.start // 8}" for span in plan.ranges(32)}
    first = next_level(plan, nodes)
    assert first == {Range(at, at + 8): [Range(i, i + 1) for i in range(at, at + 8)] for at in (0, 8, 16, 24)}
    second = next_level(plan, {span: nodes[parts[0]] for span, parts in first.items()})
    assert second == {Range(0, 16): [Range(0, 8), Range(8, 16)], Range(16, 32): [Range(16, 24), Range(24, 32)]}


def test_lost_sums_are_divided_into_what_adapters_are_given() -> None:
    assert as_handed_out([Range(0, 8), Range(9, 10)], plan_of(12).ranges(6)) == [
        *(Range(at, at + 2) for at in (0, 2, 4, 6)),
        Range(9, 10),
    ]


def combined_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> tuple[Result, list[int]]:
    """A run whose adapters combine whatever there is, and how many sums the learner took each time it was asked.

    Its bits are those of one process.
    """
    alone = fit(sinusoid(tmp_path), 0, "alone")
    monkeypatch.setattr(combining, "LEARNER_TAKES_BYTES", 0)
    step, numbers = RemoteLearner.step, list[int]()

    def counted(learner: RemoteLearner, plan: Plan, sums: dict[Range, Any]) -> Any:
        numbers.append(len(sums))
        return step(learner, plan, sums)

    monkeypatch.setattr(RemoteLearner, "step", counted)
    result = fit(sinusoid(tmp_path), workers, "combined")
    assert bits(result) == bits(alone)
    return result, numbers


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, 3])
def test_the_learner_takes_one_sum_and_the_bits_are_those_of_one_process(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    _, numbers = combined_as_alone(tmp_path, monkeypatch, workers)
    assert numbers == [1] * 12


@pytest.mark.ray
def test_an_adapter_killed_while_it_combines_costs_no_bit(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "one_was_killed"

    class KilledAdapter(AdapterActor):
        """The first one that combines in some step is killed. Local, so that Ray pickles the class whole."""

        def combine(self, span: Range, parts: list[Range], sums: list[Any]) -> Any:
            if is_first(marker):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().combine(span, parts, sums)

    monkeypatch.setattr("metadist.distributed.ray_executor.AdapterActor", KilledAdapter)
    result, numbers = combined_as_alone(tmp_path, monkeypatch, 2)
    assert marker.exists()
    assert (result.adapters_lost, result.chunks_recomputed) == (1, 0)
    assert numbers == [1] * 12


@pytest.mark.ray
def test_sums_that_are_lost_before_they_are_combined_are_computed_again(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "some_were_lost"

    class Loses(AdapterActor):
        def combine(self, span: Range, parts: list[Range], sums: list[Any]) -> Any:
            if is_first(marker):
                raise SumsLost(parts[1:])
            return super().combine(span, parts, sums)

    monkeypatch.setattr("metadist.distributed.ray_executor.AdapterActor", Loses)
    result, numbers = combined_as_alone(tmp_path, monkeypatch, 2)
    # Seven chunks: one adapter has four, the other three.
    assert (result.adapters_lost, result.chunks_recomputed) == (0, 3)
    assert numbers == [1] * 12


@pytest.mark.ray
def test_it_names_each_range_that_is_gone(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    get, here, gone = ray.get, ray.put("here"), ray.put("gone")

    def without(references: Any, **options: Any) -> Any:
        if gone in (references if isinstance(references, list) else [references]):
            raise ray.exceptions.ObjectLostError(gone.hex(), None, "")
        return get(references, **options)

    monkeypatch.setattr(ray, "get", without)
    assert fetched([Range(0, 1)], [here]) == {Range(0, 1): "here"}
    with pytest.raises(SumsLost) as raised:
        fetched([Range(0, 1), Range(1, 2)], [here, gone])
    assert raised.value.args == ([Range(1, 2)],)


@pytest.mark.ray
def test_what_the_learner_misses_is_computed_again_and_combined_again(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "one_was_missed"

    class Misses(LearnerActor):
        def step(self, plan: Plan, spans: list[Range], sums: list[Any]) -> Any:
            if plan.step == 5 and is_first(marker):
                raise SumsLost(spans)
            return super().step(plan, spans, sums)

    monkeypatch.setattr("metadist.distributed.remote_learner.LearnerActor", Misses)
    result, numbers = combined_as_alone(tmp_path, monkeypatch, 2)
    assert result.chunks_recomputed == 7
    assert numbers == [1] * 13


class Handed:
    """Work on three ranges without Ray: keeps who was given which."""

    SPANS = (Range(0, 8), Range(8, 16), Range(16, 24))

    def __init__(self, **of_work: Any) -> None:
        self.to: dict[Range, str] = {}
        ledger = Ledger("step 0", self.SPANS)
        self.work = Work(plan_of(24), None, ledger, self._submit, Pace(1.0), **of_work)  # type: ignore[arg-type]

    def _submit(self, actor: Any, span: Range) -> Any:
        self.to[span] = actor
        return f"receipt {span}", f"result {span}"

    def call(self, span: Range) -> Call:
        (call,) = [call for call in self.work.calls.values() if call.span == span]
        return call


def slots(*names: str) -> list[Slot]:
    """Adapters on the nodes of their names' first letters."""
    return [Slot(name, None, node=name[0]) for name in names]


def test_a_range_goes_to_an_adapter_where_its_parts_lie_and_elsewhere_where_there_is_none() -> None:
    handed = Handed(homes=dict(zip(Handed.SPANS, ("b", "c", "gone"), strict=True)))
    handed.work.hand_out(slots("a1", "a2", "b1", "c1", "c2"))
    assert handed.to == dict(zip(Handed.SPANS, ("b1", "c1", "a1"), strict=True))
    assert [handed.call(span).result.node for span in Handed.SPANS] == ["b", "c", "a"]


def test_what_a_dead_adapter_had_goes_to_another_node_whose_adapters_may_live() -> None:
    there = slots(*(f"b{number}" for number in range(8)), "c1")
    handed = Handed(homes=dict.fromkeys(Handed.SPANS, "b"))
    handed.work.hand_out(there[:4])
    call = handed.call(Range(0, 8))
    assert call.result.node == "b"
    del handed.work.calls[f"receipt {call.span}"]  # type: ignore[arg-type]
    handed.work.died(call)
    handed.work.hand_out(there)
    assert handed.to[Range(0, 8)] == "c1"


def test_a_range_whose_parts_are_gone_is_given_up_unless_another_adapter_has_made_it() -> None:
    handed = Handed()
    handed.work.hand_out(slots("a", "b", "c"))
    handed.work.missed(handed.call(Range(0, 8)), [Range(0, 4)])
    handed.work.done(handed.call(Range(8, 16)), Receipt())
    handed.work.missed(handed.call(Range(8, 16)), [Range(8, 12)])
    handed.work.missed(handed.call(Range(16, 24)), [Range(20, 24)])
    assert handed.work.ledger.complete
    assert (set(handed.work.results), handed.work.lost) == ({Range(8, 16)}, {Range(0, 4), Range(20, 24)})


def test_fewer_ranges_than_adapters_go_to_as_many_nodes_as_there_are() -> None:
    handed = Handed()
    handed.work.hand_out(slots("a1", "a2", "b1", "b2", "c1", "c2"))
    assert list(handed.to.values()) == ["a1", "b1", "c1"]
    # With as many as there are adapters, neighbours share a node.
    handed = Handed()
    handed.work.hand_out(slots("a1", "b1", "a2"))
    assert list(handed.to.values()) == ["a1", "a2", "b1"]


def test_combining_is_timed_by_the_number_of_parts() -> None:
    handed = Handed(sizes=dict.fromkeys(Handed.SPANS, 2))
    handed.work.hand_out(slots("a"))
    for _ in range(ENOUGH):
        handed.work.pace.note(1, 1.0)
    assert handed.work.deadline_s(Range(0, 8)) == 2 * FACTOR
