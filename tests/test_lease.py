"""One process at a time in a run directory."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs
import pytest
from click.testing import CliRunner
from pyarrow import fs
from rich.console import Console

from metadist import MetaTrainer
from metadist.callbacks import Callback
from metadist.cli import cli
from metadist.config import Config
from metadist.errors import LeaseError, LeaseLostError, RunDirectoryError
from metadist.lease import LEASE_FILE, Lease
from metadist.sections import CheckpointSettings, RunSettings
from tests.builders import tiny_config

CONFIG = str(Path(__file__).parents[1] / "configs/sinusoid_maml.yaml")
WAIT_S = 60
FOREIGN = {"id": "f00", "host": "elsewhere", "machine": "m", "pid": 7, "process": "1", "since": "noon", "beat": 3}
HOLD = """
import sys, time
from rich.console import Console
from metadist.lease import Lease
with Lease(sys.argv[1], Console()):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats and patience of a fraction of a second, in the same order."""
    monkeypatch.setattr("metadist.lease.BEAT_S", 0.05)
    monkeypatch.setattr("metadist.lease.SILENT_S", 3.0)
    monkeypatch.setattr("metadist.lease.SETTLE_S", {"local": 0.5, "remote": 0.5})


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> fs.FileSystem:
    """Every location lies in this object store, whose clock stands still: it gives no ages."""
    in_memory = pyarrow.fs._MockFileSystem()
    monkeypatch.setattr("metadist.lease.open_file_system", lambda location: (in_memory, location.strip("/")))
    return in_memory


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lease on `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def told() -> Console:
    return Console(file=io.StringIO(), width=1000)


def text_of(console: Console) -> str:
    return console.file.getvalue()


def config_in(tmp_path: Path, **changes: object) -> Config:
    kept = CheckpointSettings(checkpoint_frequency=2)
    return tiny_config(run=RunSettings(name="run", storage_path=str(tmp_path), checkpoint_config=kept), **changes)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def write_lease(directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    file = directory / LEASE_FILE
    whole = directory / "whole"
    whole.write_text(json.dumps(FOREIGN | changes))
    return whole.rename(file)


def winners(location: str, racers: int) -> tuple[int, int]:
    """How many of so many that want the lease at once get it, and how many are refused."""
    outcomes, start = [], threading.Barrier(racers)
    all_tried = threading.Barrier(racers)

    def race() -> None:
        start.wait()
        try:
            with Lease(location, told()):
                outcomes.append("held")
                all_tried.wait(WAIT_S)
        except LeaseError:
            outcomes.append("refused")
            all_tried.wait(WAIT_S)

    threads = [threading.Thread(target=race) for _ in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes.count("held"), outcomes.count("refused")


def test_a_second_trainer_is_refused_and_told_whom_to_wait_for(other: subprocess.Popen, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = CliRunner().invoke(cli, ["train", CONFIG, "--workers", "0", "--run-dir", str(run_dir)])
    assert done.exit_code == 2
    since = json.loads((run_dir / LEASE_FILE).read_text())["since"]
    assert f"LeaseError: {run_dir}: process {other.pid} on" in done.stderr
    assert f"(since {since}) trains in this run directory" in done.stderr
    assert f"kill {other.pid}" in done.stderr
    assert "another --run-dir" in done.stderr
    assert [path.name for path in run_dir.iterdir()] == [LEASE_FILE]


def test_after_a_holder_was_killed_the_same_command_goes_on(other: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(LeaseError):
        MetaTrainer(config_in(tmp_path)).fit(evaluate=False)
    # Nobody asks for its status yet: the process is still in the table, as a zombie.
    os.kill(other.pid, 9)
    wait_for(lambda: ") Z " in Path(f"/proc/{other.pid}/stat").read_text())
    console = told()
    assert MetaTrainer(config_in(tmp_path), console=console).fit(evaluate=False).step == 6
    assert "looking for a heartbeat" not in text_of(console)
    other.wait()
    assert not (tmp_path / "run" / LEASE_FILE).exists()
    assert "lease" not in [thread.name for thread in threading.enumerate()]


def test_a_process_id_that_was_given_to_another_process_holds_nothing(tmp_path: Path) -> None:
    with Lease(str(tmp_path / "run"), told()):
        mine = json.loads((tmp_path / "run" / LEASE_FILE).read_text())
    write_lease(tmp_path / "run", **mine)
    with pytest.raises(LeaseError), Lease(str(tmp_path / "run"), told()):
        pass
    write_lease(tmp_path / "run", **{**mine, "process": str(int(mine["process"]) - 1)})
    with Lease(str(tmp_path / "run"), told()):
        assert json.loads((tmp_path / "run" / LEASE_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("remote", [False, True])
def test_an_old_heartbeat_of_another_machine_is_taken_over_at_once(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    if remote:
        # Not a LocalFileSystem, so it is treated as an object store, and it gives ages.
        inside = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
        monkeypatch.setattr("metadist.lease.open_file_system", lambda location: (inside, Path(location).name))
    file = write_lease(tmp_path / "run")
    long_ago = file.stat().st_mtime - 100
    os.utime(file, (long_ago, long_ago))
    console = told()
    with Lease(str(tmp_path / "run"), console):
        assert json.loads(file.read_text())["id"] != FOREIGN["id"]
    assert text_of(console) == ""
    assert not list((tmp_path / "run").iterdir())


def test_a_heartbeat_of_another_machine_is_waited_for_and_refuses(quick: None, store: fs.FileSystem) -> None:
    holder, console = Lease("bucket/run", told()), told()
    holder._own = dataclasses.replace(holder._own, host="elsewhere")
    with holder:
        with pytest.raises(LeaseError, match=r"on elsewhere \(since"), Lease("bucket/run", console):
            pass
        assert "looking for a heartbeat" in text_of(console)
    with Lease("bucket/run", told()):
        pass


def test_a_counter_that_stands_still_is_taken_over_whatever_the_clocks_say(quick: None, store: fs.FileSystem) -> None:
    store.create_dir("bucket/run")
    with store.open_output_stream(f"bucket/run/{LEASE_FILE}") as stream:
        stream.write(json.dumps(FOREIGN).encode())
    console = told()
    with Lease("bucket/run", console), store.open_input_stream(f"bucket/run/{LEASE_FILE}") as stream:
        assert json.loads(stream.read())["pid"] == os.getpid()
    assert "process 7 on elsewhere (since noon): looking" in text_of(console)


@pytest.mark.parametrize("content", [b"", b'{"id": "f0', b"[]", b"{}", json.dumps(FOREIGN | {"pid": -1}).encode()])
def test_a_torn_lease_is_nobodys(quick: None, tmp_path: Path, content: bytes) -> None:
    write_lease(tmp_path / "run").write_bytes(content)
    first, second = Lease(str(tmp_path / "run"), told()), Lease(str(tmp_path / "run"), told())
    with first, pytest.raises(LeaseError, match=str(os.getpid())), second:
        pass


def test_one_of_many_gets_a_new_local_run_directory(tmp_path: Path) -> None:
    assert winners(str(tmp_path / "run"), 8) == (1, 7)


@pytest.mark.parametrize("place", ["local", "remote"])
def test_one_of_many_gets_what_a_dead_holder_left(
    quick: None, tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    with Lease(str(tmp_path / "x"), told()):
        ended = (tmp_path / "x" / LEASE_FILE).read_text()
    dead = json.loads(ended) | {"process": "0"}
    if place == "local":
        write_lease(tmp_path / "run", **dead)
        assert winners(str(tmp_path / "run"), 8) == (1, 7)
        return
    store = request.getfixturevalue("store")
    store.create_dir("bucket/run")
    with store.open_output_stream(f"bucket/run/{LEASE_FILE}") as stream:
        stream.write(json.dumps(dead).encode())
    assert winners("bucket/run", 8) == (1, 7)


def test_one_of_many_gets_a_new_run_directory_in_an_object_store(quick: None, store: fs.FileSystem) -> None:
    assert winners("bucket/run", 8) == (1, 7)
    # The directory stays where the one that made it was refused while another held the lease.
    left = store.get_file_info(fs.FileSelector("bucket", allow_not_found=True, recursive=True))
    assert [each.path for each in left if each.type != fs.FileType.Directory] == []


class TakesOver(Callback):
    """After the first step, another machine writes its own lease; goes on once the heartbeat has seen it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_step(self, step: int, metrics: object, status: object) -> None:
        if step == 1:
            wait_for(self.has_been_seen)

    def has_been_seen(self) -> bool:
        # Again and again: a heartbeat that was read just before is written just after.
        write_lease(self.directory)
        return "lease" not in [thread.name for thread in threading.enumerate()]


def test_who_has_lost_the_lease_ends_before_the_next_checkpoint_and_leaves_it_to_the_other(
    quick: None, tmp_path: Path
) -> None:
    trainer = MetaTrainer(config_in(tmp_path), callbacks=[TakesOver(tmp_path / "run")])
    with pytest.raises(LeaseLostError, match=r"process 7 on elsewhere.*It ends after step 2"):
        trainer.fit(evaluate=False)
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert json.loads((tmp_path / "run" / LEASE_FILE).read_text()) == FOREIGN


def test_a_heartbeat_that_cannot_be_written_is_told_once_and_one_that_was_removed_is_made_again(
    quick: None, tmp_path: Path
) -> None:
    console, file = told(), tmp_path / "run" / LEASE_FILE
    with Lease(str(tmp_path / "run"), console) as lease:
        wait_for(lambda: json.loads(file.read_text())["beat"] > 1)
        failed = []

        def fail(content: bytes) -> None:
            failed.append(content)
            raise OSError(28, "No space left on device")

        replace, lease._file.replace = lease._file.replace, fail
        wait_for(lambda: len(failed) > 2)
        assert text_of(console).count("could not be written (No space left on device)") == 1
        file.unlink()
        lease._file.replace = replace
        wait_for(file.exists)
    assert not file.exists()


def test_a_run_that_is_refused_before_it_began_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no checkpoint to go on from"):
        MetaTrainer(config_in(tmp_path), resume="must").fit()
    assert not list(tmp_path.iterdir())
