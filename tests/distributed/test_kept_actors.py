"""Actors that one run leaves to the next: the same processes, the bits of new ones, and none that is at work still."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from metadist import MetaTrainer
from metadist.distributed import kept_actors
from metadist.errors import AdapterError
from metadist.sections import ScalingSettings
from tests.distributed.faulty import Raises, processes_named
from tests.distributed.test_same_bits import bits, fit, images, sinusoid

pytestmark = pytest.mark.ray


def processes() -> tuple[set[int], set[int]]:
    """Ids of the processes of adapters, and of learners."""
    adapters, learners = (processes_named(f"ray::{name}Actor", os.getpid()) for name in ("Adapter", "Learner"))
    return set(adapters), set(learners)


def wait_until_ended(pids: set[int]) -> None:
    """A killed actor's process is there for a moment longer."""
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"{pids} should have ended"
        time.sleep(0.05)


def test_the_next_run_has_the_same_processes_and_the_bits_of_new_ones(local_ray: None, tmp_path: Path) -> None:
    fit(sinusoid(tmp_path), 2, "before")
    adapters, learners = processes()
    assert (len(adapters), len(learners)) == (2, 1)
    # Another task, model and batch-norm policy.
    config = images(tmp_path, "running")
    assert bits(fit(config, 2, "next")) == bits(fit(config, 0, "alone"))
    assert processes() == (adapters, learners)
    # What a smaller run has no use for is ended before it begins.
    fit(sinusoid(tmp_path), 1, "smaller")
    (kept,) = processes()[0] & adapters
    wait_until_ended(adapters - {kept})
    # Nor does one that died meanwhile come back.
    os.kill(kept, signal.SIGKILL)
    wait_until_ended({kept})
    result = fit(sinusoid(tmp_path), 1, "after_a_death")
    assert result.adapters_lost == 0
    assert bits(result) == bits(fit(sinusoid(tmp_path), 0, "sinusoid_alone"))


def test_a_run_with_other_resources_finds_them_free(local_ray: None, tmp_path: Path) -> None:
    config = sinusoid(tmp_path)
    fit(config, 3, "before")
    before = processes()[0]
    # All four CPUs of this Ray: as long as three are held, it waits.
    all_of_it = ScalingSettings(num_workers=1, resources_per_worker={"CPU": 4.0})
    run = dataclasses.replace(config.run, name="large")
    MetaTrainer(config, scaling_config=all_of_it, run_config=run).fit(evaluate=False)
    wait_until_ended(before)


def test_what_a_run_leaves_in_the_middle_of_its_work_is_ended(local_ray: None, tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        fit(dataclasses.replace(sinusoid(tmp_path), task=Raises(step=6)), 2, "raises")
    adapters, learners = processes()
    wait_until_ended(adapters | learners)


def test_a_run_by_itself_leaves_no_process(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set.union(*processes())
    monkeypatch.setattr(kept_actors, "_kept", None)
    fit(sinusoid(tmp_path), 1, "by_itself")
    wait_until_ended(set.union(*processes()) - before)
