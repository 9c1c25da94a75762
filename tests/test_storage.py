"""A storage that fails and comes back: tried again with longer and longer waits, and told; no run ends of it."""

import dataclasses
import errno
import itertools

import pytest
from pyarrow import fs
from rich.console import Console

from metadist import MetaTrainer
from metadist.checkpoint import Checkpoints
from metadist.errors import MetadistError, RunDirectoryError
from metadist.files import WRITE_PATIENCE_S, patiently
from metadist.run_directory import RunDirectory
from metadist.sections import CheckpointSettings, RunSettings, TrainingSettings
from tests.builders import tiny_config
from tests.flaky_storage import FlakyStorage
from tests.test_checkpoint import STATISTICS, THETA, bits_of, state_at


@pytest.fixture
def waits(monkeypatch):
    """The waits that were asked for; none of them takes any time."""
    waited = []
    monkeypatch.setattr("metadist.files.time.sleep", waited.append)
    return waited


def storage(tmp_path, fails, told):
    directory = RunDirectory(str(tmp_path / "run"), told.append)
    directory.file_system, directory.is_local = fs.PyFileSystem(FlakyStorage(fails)), False
    return directory


def test_an_operation_that_fails_once_at_any_place_of_a_checkpoint_costs_a_wait_and_nothing_else(tmp_path, waits):
    def saved_and_loaded(number):
        """One life of two checkpoints, the older removed; the operation of this number fails."""
        count, told = itertools.count(), []
        directory = storage(tmp_path / str(number), lambda what: next(count) == number, told)
        directory.create()
        checkpoints = Checkpoints(directory, THETA, STATISTICS)
        for step in (3, 4):
            checkpoints.save(state_at(step))
        checkpoints.remove_old(keep=1, best=None)
        warnings = []
        assert bits_of(checkpoints.load_latest(warnings.append)) == bits_of(state_at(4))
        assert checkpoints.steps() == [4]
        assert warnings == []
        return next(count), told

    operations, told = saved_and_loaded(None)
    assert told == []
    assert operations > 40
    for number in range(operations):
        waits.clear()
        _, told = saved_and_loaded(number)
        assert waits == [0.5]
        assert "AWS Error NETWORK_CONNECTION" in told[0]
        assert told[0].endswith("Trying again in 0.5 s.")
        assert told[1].endswith("it is there again, after 0.5 s.")
        assert len(told) == 2


def test_the_waits_grow_and_come_to_an_end(tmp_path, waits):
    directory = storage(tmp_path, lambda what: what == "write", [])
    (tmp_path / "run").mkdir()
    with pytest.raises(MetadistError, match=r"a.json: could not be written \(When uploading part: AWS Error NETWORK"):
        directory.write("a.json", b"{}")
    assert waits[:7] == [0.5, 1, 2, 4, 8, 16, 30]
    assert set(waits[7:]) == {30}
    assert WRITE_PATIENCE_S <= sum(waits) < WRITE_PATIENCE_S + 30


@pytest.mark.parametrize(
    ("error", "is_local"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EROFS, "Read-only file system"), True),
        (PermissionError("no"), False),
        (FileNotFoundError("no"), False),
        (OSError("When creating key: AWS Error ACCESS_DENIED during PutObject operation: Access Denied"), False),
        (OSError("path is a directory"), True),
    ],
    ids=str,
)
def test_what_time_does_not_heal_is_raised_at_once(waits, error, is_local):
    def fail():
        raise error

    with pytest.raises(OSError, match=r".") as raised:
        patiently(fail, "a place", pytest.fail, is_local, 300.0)
    assert raised.value is error
    assert waits == []


def test_a_network_disk_that_does_not_answer_is_tried_again(waits):
    answers = iter([OSError(errno.ESTALE, "Stale file handle"), ConnectionError("reset"), None])

    def answer():
        if (error := next(answers)) is not None:
            raise error
        return "content"

    told = []
    assert patiently(answer, "a place", told.append, False, 300.0) == "content"
    assert waits == [0.5, 1]
    assert told[0] == "a place: Stale file handle. Trying again in 0.5 s."


def test_reading_has_less_patience_than_writing(tmp_path, waits):
    directory = storage(tmp_path, lambda what: what == "read", [])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("x")
    with pytest.raises(RunDirectoryError, match="not readable"):
        directory.read("config.yaml")
    assert sum(waits) < 60


def test_a_run_goes_through_outages_of_its_storage_with_equal_bits_and_says_so(tmp_path, monkeypatch, waits, capsys):
    config = tiny_config(
        training=TrainingSettings(steps=6, meta_batch_size=4, chunk_size=2, compile=False),
        run=RunSettings(
            name="run",
            storage_path=str(tmp_path / "quiet"),
            log_every=1,
            checkpoint_config=CheckpointSettings(checkpoint_frequency=1),
        ),
    )
    quiet = MetaTrainer(config).fit(evaluate=False)
    asked = itertools.count()

    class Stored(RunDirectory):
        def __init__(self, location, notify=None):
            super().__init__(location, notify)
            # Of nine operations, three in a row fail.
            flaky = FlakyStorage(lambda what: next(asked) % 9 > 5)
            self.file_system, self.is_local = fs.PyFileSystem(flaky), False
            self.local = tmp_path / "here"
            self.local.mkdir()

    monkeypatch.setattr("metadist.training.RunDirectory", Stored)
    stormy = dataclasses.replace(config, run=dataclasses.replace(config.run, storage_path=str(tmp_path / "stormy")))
    result = MetaTrainer(stormy, console=Console(stderr=True, soft_wrap=True)).fit(evaluate=False)
    assert (result.theta_sha256, result.optimizer_sha256) == (quiet.theta_sha256, quiet.optimizer_sha256)
    said = capsys.readouterr().err
    assert "stormy/run/" in said.split(": When uploading part: AWS Error NETWORK_CONNECTION")[0]
    assert "it is there again" in said
    metrics = [(tmp_path / name / "run/metrics.jsonl").read_text() for name in ("quiet", "stormy")]
    assert metrics[0] == metrics[1]
    assert len(waits) > 50
