"""One process trains in a run directory at a time."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from metadist import MetaTrainer, RunSettings
from metadist.errors import RunDirectoryError
from metadist.lease import LEASE_FILE, Lease
from metadist.run_directory import RunDirectory
from tests.builders import tiny_config


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metadist.lease.BEAT_S", 0.05)
    monkeypatch.setattr("metadist.lease.EXPIRES_S", 1.0)
    monkeypatch.setattr("metadist.lease.SETTLE_S", 0.1)


@pytest.fixture(params=["local", "store"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> RunDirectory:
    made = RunDirectory(str(tmp_path / "run"))
    made.create()
    made.is_local = request.param == "local"
    return made


def lease(directory: RunDirectory, tell: Callable[[str], None] = lambda text: None) -> Lease:
    return Lease(directory, tell)


def test_a_second_holder_is_refused_and_told_who_holds_it(directory: RunDirectory) -> None:
    first = lease(directory)
    first.acquire()
    since = directory.read_json(LEASE_FILE)["since"]
    with pytest.raises(RunDirectoryError, match=rf"held by process \d+ on .* since {since[:10]}.*--run-dir"):
        lease(directory).acquire()
    first.release()
    assert not directory.exists(LEASE_FILE)
    second = lease(directory)
    second.acquire()
    second.release()


def test_a_holder_elsewhere_that_beats_is_refused(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lease(directory)
    first.acquire()
    monkeypatch.setattr("metadist.lease._machine", lambda: "another")
    with pytest.raises(RunDirectoryError, match="held by process"):
        lease(directory).acquire()
    first.release()


def test_a_holder_elsewhere_whose_beat_stands_still_is_replaced(directory: RunDirectory) -> None:
    told: list[str] = []
    holder = {"holder": "x", "beat": 7, "since": "2026-01-01T00:00:00+00:00", "host": "elsewhere", "pid": 1}
    directory.write_json(LEASE_FILE, holder | {"machine": "another", "started": "1"})
    second = lease(directory, told.append)
    second.acquire()
    assert "waiting 1 s" in told[0]
    assert "process 1 on elsewhere" in told[1]
    second.release()


def test_a_process_of_this_machine_that_was_killed_is_replaced_at_once(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metadist.lease.EXPIRES_S", 1e9)
    code = (
        "import os, sys; from metadist.lease import Lease; from metadist.run_directory import RunDirectory;"
        "Lease(RunDirectory(sys.argv[1]), print).acquire(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, directory.location]).returncode == -9
    assert directory.exists(LEASE_FILE)
    second = lease(directory)
    second.acquire()
    second.release()


def test_another_process_with_a_dead_holders_number_does_not_count(directory: RunDirectory) -> None:
    first = lease(directory)
    first.acquire()
    left = directory.read_json(LEASE_FILE)
    first.release()
    directory.write_json(LEASE_FILE, left | {"started": "1"})
    second = lease(directory)
    second.acquire()
    second.release()


def test_a_holder_that_was_replaced_stops_and_leaves_the_lease(directory: RunDirectory) -> None:
    first = lease(directory)
    first.acquire()

    def stop() -> bool:
        # A beat under way may have written over it once.
        directory.write_json(LEASE_FILE, other)
        return guarded()

    guarded = first.guard(lambda: False)
    other = {"holder": "x", "beat": 0, "since": "now", "host": "elsewhere", "pid": 1, "machine": "b", "started": "1"}
    with pytest.raises(RunDirectoryError, match="elsewhere"):
        _until(stop)
    first.release()
    assert directory.read_json(LEASE_FILE)["holder"] == "x"


def test_a_lease_that_cannot_be_renewed_is_told_once(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    first = lease(directory, told.append)
    first.acquire()

    def full(name: str, value: object) -> None:
        raise RunDirectoryError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(directory, "write_json", full)
        while not told:
            first.guard(lambda: False)()
    first.release()
    assert told == ["The lease could not be renewed: disk full"]


def test_a_damaged_lease_is_an_error_that_names_the_file(directory: RunDirectory) -> None:
    for damaged in (b"{", json.dumps([]).encode()):
        directory.write(LEASE_FILE, damaged)
        with pytest.raises(RunDirectoryError, match=r"lease\.json"):
            lease(directory).acquire()


def test_training_refuses_a_directory_that_is_held_and_gives_it_back(tmp_path: Path) -> None:
    config = tiny_config(run=RunSettings(storage_path=str(tmp_path), name="run"))
    MetaTrainer(config).fit(evaluate=False)
    directory = RunDirectory(config.run_directory)
    assert not directory.exists(LEASE_FILE)
    holder = lease(directory)
    holder.acquire()
    before = (tmp_path / "run/config.yaml").stat().st_mtime_ns
    with pytest.raises(RunDirectoryError, match="held by"):
        MetaTrainer(config).fit(evaluate=False)
    assert (tmp_path / "run/config.yaml").stat().st_mtime_ns == before
    holder.release()
    MetaTrainer(config).fit(evaluate=False)


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass
