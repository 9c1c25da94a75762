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
from metadist.distributed.actors import AdapterActor, SumsLost, fetched
from metadist.distributed.combining import as_handed_out, next_level
from metadist.distributed.remote_learner import RemoteLearner
from metadist.distributed.work import Result, Slot
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


def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has adapters combine whatever there is, and gives how many sums the learner took in each step."""
    monkeypatch.setattr(combining, "LEARNER_TAKES_BYTES", 0)
    step, numbers = RemoteLearner.step, list[int]()

    def counted(learner: RemoteLearner, plan: Plan, sums: dict[Range, Any]) -> Any:
        numbers.append(len(sums))
        return step(learner, plan, sums)

    monkeypatch.setattr(RemoteLearner, "step", counted)
    return numbers


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, 3])
def test_the_learner_takes_one_sum_and_the_bits_are_those_of_one_process(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    alone = fit(sinusoid(tmp_path), 0, "alone")
    numbers = taken(monkeypatch)
    assert bits(fit(sinusoid(tmp_path), workers, "combined")) == bits(alone)
    assert numbers == [1] * 12


@pytest.mark.ray
def test_an_adapter_killed_while_it_combines_costs_no_bit(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "one_was_killed"

    class KilledAdapter(AdapterActor):
        """The first one that combines in some step is killed. Local, so that Ray pickles the class whole."""

        def combine(self, span: Range, parts: list[Range], sums: list[Any]) -> Any:
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                return super().combine(span, parts, sums)
            os.kill(os.getpid(), signal.SIGKILL)

    alone = fit(sinusoid(tmp_path), 0, "alone")
    numbers = taken(monkeypatch)
    monkeypatch.setattr("metadist.distributed.ray_executor.AdapterActor", KilledAdapter)
    result = fit(sinusoid(tmp_path), 2, "killed")
    assert marker.exists()
    assert (bits(result), result.adapters_lost, result.chunks_recomputed) == (bits(alone), 1, 0)
    assert numbers == [1] * 12


@pytest.mark.ray
def test_sums_that_are_lost_before_they_are_combined_are_computed_again(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "some_were_lost"

    class Loses(AdapterActor):
        def combine(self, span: Range, parts: list[Range], sums: list[Any]) -> Any:
            if not marker.exists():
                marker.touch()
                raise SumsLost(parts[1:])
            return super().combine(span, parts, sums)

    alone = fit(sinusoid(tmp_path), 0, "alone")
    numbers = taken(monkeypatch)
    monkeypatch.setattr("metadist.distributed.ray_executor.AdapterActor", Loses)
    result = fit(sinusoid(tmp_path), 2, "lost")
    # Seven chunks: one adapter has four, the other three.
    assert (bits(result), result.adapters_lost, result.chunks_recomputed) == (bits(alone), 0, 3)
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


def test_a_range_goes_to_an_adapter_where_its_parts_lie_and_elsewhere_where_there_is_none() -> None:
    from metadist.distributed.ledger import Ledger
    from metadist.distributed.pace import Pace
    from metadist.distributed.work import Work

    given_to: dict[Range, str] = {}

    def submit(actor: Any, span: Range) -> Any:
        given_to[span] = actor
        return f"receipt {span}", f"result {span}"

    spans = [Range(0, 8), Range(8, 16), Range(16, 24)]
    homes = dict(zip(spans, ("b", "c", "gone"), strict=True))
    work = Work(plan_of(24), None, Ledger("step 0", spans), submit, Pace(1.0), homes=homes)  # type: ignore[arg-type]
    work.hand_out([Slot(name, None, node=name[0]) for name in ("a1", "a2", "b1", "c1", "c2")])
    assert given_to == dict(zip(spans, ("b1", "c1", "a1"), strict=True))
    assert {call.span: call.result for call in work.calls.values()} == {
        span: Result(f"result {span}", node) for span, node in zip(spans, "bca", strict=True)
    }
