import errno
import hashlib
import json
import os

import numpy as np
import pytest
from pyarrow import fs
from safetensors.numpy import load_file, save

from metadist.checkpoint import Checkpoints, CheckpointWriter
from metadist.core.params import Layout
from metadist.distributed.learner import LearnerState
from metadist.errors import CheckpointError, MetadistError
from metadist.run_directory import RunDirectory
from tests.full_disk import FullDisk

THETA = Layout({"net.weight": (3, 4), "rate": (), "net.bias": (3,)})
STATISTICS = Layout({"norm.running_mean": (2,), "norm.running_var": (2,)})
FILES = [
    *(f"{name}.safetensors" for name in ("theta", "statistics", "optimizer", "previous")),
    "state.json",
    "manifest.json",
]


def state_at(step):
    """Random bits, among them NaN, infinity, negative zero and the smallest numbers; other ones for each step."""
    random = np.random.default_rng(step)

    def bits(size):
        return random.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)

    theta = bits(THETA.size)
    theta[:4] = [-0.0, np.inf, 1e-45, np.nan]
    optimizer = {"step": np.array(float(step), np.float32), "exp_avg": bits(THETA.size), "exp_avg_sq": bits(THETA.size)}
    return LearnerState(step, theta, bits(STATISTICS.size), optimizer, bits(THETA.size + STATISTICS.size))


def bits_of(state):
    arrays = {"theta": state.theta, "statistics": state.statistics} | state.optimizer
    if state.previous is not None:
        arrays["previous"] = state.previous
    return state.step, {name: (value.dtype, value.shape, value.tobytes()) for name, value in arrays.items()}


@pytest.fixture
def directory(tmp_path):
    found = RunDirectory(str(tmp_path / "run"))
    found.create()
    return found


@pytest.fixture
def checkpoints(directory):
    return Checkpoints(directory, THETA, STATISTICS)


@pytest.fixture
def place(directory):
    """Where the files of a step lie."""
    return lambda step: directory.local / f"checkpoints/step_{step:08d}"


def load_latest(checkpoints):
    warnings = []
    return checkpoints.load_latest(warnings.append), warnings


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 1_234_567_890])
def test_what_is_loaded_is_what_was_saved_to_the_bit(checkpoints, step):
    checkpoints.save(state_at(step))
    assert bits_of(checkpoints.load(step)) == bits_of(state_at(step))
    assert checkpoints.steps() == [step]


def test_a_state_before_the_first_step_has_no_optimizer_and_maybe_no_statistics(directory):
    checkpoints = Checkpoints(directory, THETA, Layout({}))
    state = LearnerState(0, state_at(0).theta, np.zeros(0, np.float32))
    checkpoints.save(state)
    assert bits_of(checkpoints.load(0)) == bits_of(state)


def test_any_reader_of_safetensors_finds_the_parameters_by_name(checkpoints, place):
    checkpoints.save(state_at(3))
    found = load_file(place(3) / "theta.safetensors")
    # 3 * 4 weights row by row, then the scalar, then 3 biases.
    theta = state_at(3).theta
    assert found["net.weight"].tobytes() == theta[:12].tobytes()
    assert found["net.weight"].shape == (3, 4)
    assert found["rate"].tobytes() == theta[12:13].tobytes()
    assert found["rate"].shape == ()
    assert found["net.bias"].tobytes() == theta[13:].tobytes()


def test_the_manifest_gives_the_sha_256_of_every_other_file(checkpoints, place):
    checkpoints.save(state_at(3))
    digests = {name: hashlib.sha256((place(3) / name).read_bytes()).hexdigest() for name in FILES[:-1]}
    text = (place(3) / "manifest.json").read_text()
    assert json.loads(text) == {"format": 1, "sha256": digests}
    assert '"format": 1,' in text
    assert sorted(path.name for path in place(3).iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_in_any_file_is_found(checkpoints, place, name):
    checkpoints.save(state_at(3))
    path = place(3) / name
    intact = path.read_bytes()
    random = np.random.default_rng(4)
    for position, mask in zip(random.integers(0, len(intact), 100), random.integers(1, 256, 100), strict=True):
        damaged = bytearray(intact)
        damaged[position] ^= mask
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="The checkpoint is not used"):
            checkpoints.load(3)
    path.write_bytes(intact)
    assert bits_of(checkpoints.load(3)) == bits_of(state_at(3))


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_at_any_byte_is_found(checkpoints, place, name):
    checkpoints.save(state_at(3))
    path = place(3) / name
    intact = path.read_bytes()
    for length in range(len(intact)):
        path.write_bytes(intact[:length])
        with pytest.raises(CheckpointError, match="The checkpoint is not used"):
            checkpoints.load(3)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_grew_is_found(checkpoints, place, name):
    checkpoints.save(state_at(3))
    with (place(3) / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(CheckpointError, match="The checkpoint is not used"):
        checkpoints.load(3)


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_missing_file_is_named(checkpoints, place, name):
    checkpoints.save(state_at(3))
    (place(3) / name).unlink()
    with pytest.raises(CheckpointError, match=rf"step_00000003: {name} is missing"):
        checkpoints.load(3)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named_and_the_one_before_is_used(checkpoints, place, name):
    # A directory in its place: as a disk error does, it gives no bytes.
    for step in (3, 4):
        checkpoints.save(state_at(step))
    (place(4) / name).unlink()
    (place(4) / name).mkdir()
    state, warnings = load_latest(checkpoints)
    assert bits_of(state) == bits_of(state_at(3))
    assert len(warnings) == 1
    assert f"step_00000004/{name}: not readable" in warnings[0]


def test_the_manifest_is_written_last_and_without_it_nothing_counts(checkpoints, place):
    checkpoints.save(state_at(3))
    (place(3) / "manifest.json").unlink()
    assert checkpoints.steps() == []
    assert load_latest(checkpoints) == (None, [])


def test_the_one_before_is_used_with_a_warning_that_names_the_damaged_one(checkpoints, place):
    for step in (3, 4, 5):
        checkpoints.save(state_at(step))
    for step, name in ((4, "manifest.json"), (5, "theta.safetensors")):
        path = place(step) / name
        path.write_bytes(path.read_bytes()[:-1])
    state, warnings = load_latest(checkpoints)
    assert bits_of(state) == bits_of(state_at(3))
    assert ["step_00000005: theta.safetensors" in warnings[0], "step_00000004: manifest.json" in warnings[1]] == [
        True
    ] * 2
    assert all(warning.endswith("Trying the one before.") for warning in warnings)


def test_torn_anywhere_it_is_passed_over_with_a_message_and_the_one_before_is_used(checkpoints, place):
    for step in (3, 4):
        checkpoints.save(state_at(step))
    random = np.random.default_rng(5)
    manifest = len((place(4) / "manifest.json").read_bytes())
    torn = [("manifest.json", length) for length in range(manifest)]
    data = [(name, length) for name in FILES[:-1] for length in range(len((place(4) / name).read_bytes()))]
    torn += [data[index] for index in random.choice(len(data), 100, replace=False)]
    for name, length in torn:
        path = place(4) / name
        intact = path.read_bytes()
        # A write that was cut short leaves nothing behind it, or the zeros of a file system that had made room.
        for rest in (b"", bytes(len(intact) - length)):
            path.write_bytes(intact[:length] + rest)
            if path.read_bytes() == intact:
                continue
            state, warnings = load_latest(checkpoints)
            assert bits_of(state) == bits_of(state_at(3)), f"{name} torn at byte {length} is loaded in silence"
            assert len(warnings) == 1
            assert f"step_00000004: {name}" in warnings[0]
        path.write_bytes(intact)
    assert bits_of(load_latest(checkpoints)[0]) == bits_of(state_at(4))


def resign(place, name, content):
    """Another content for a file, with a manifest that says so."""
    (place / name).write_bytes(content)
    rewrite_manifest(place, lambda digests: digests.update({name: hashlib.sha256(content).hexdigest()}))


@pytest.mark.parametrize("name", FILES)
def test_a_file_larger_than_this_models_can_be_is_refused_before_it_is_read(checkpoints, directory, place, name):
    checkpoints.save(state_at(3))
    # A file with a hole takes no room on the disk, and all that it says in memory.
    with (place(3) / name).open("r+b") as file:
        file.truncate(2**40)
    read = directory.read
    directory.read = lambda asked: pytest.fail("it was read") if asked.endswith(name) else read(asked)
    with pytest.raises(CheckpointError, match=r"has at most \d+\. The|manifest\.json is torn or altered"):
        checkpoints.load(3)


@pytest.mark.parametrize("part", ["theta", "statistics"])
def test_tensors_of_another_dtype_are_refused(checkpoints, place, part):
    checkpoints.save(state_at(3))
    tensors = load_file(place(3) / f"{part}.safetensors")
    resign(place(3), f"{part}.safetensors", save({name: v.astype(np.float64) for name, v in tensors.items()}))
    with pytest.raises(CheckpointError, match=f"{part} does not fit this model: .* is float64, not float32"):
        checkpoints.load(3)


@pytest.mark.parametrize("odd", [np.zeros(THETA.size, np.int32), np.zeros(THETA.size - 1, np.float32)])
def test_an_optimizer_of_another_dtype_or_shape_is_refused(checkpoints, place, odd):
    checkpoints.save(state_at(3))
    resign(place(3), "optimizer.safetensors", save({"exp_avg": odd}))
    with pytest.raises(CheckpointError, match=r"optimizer does not fit this model: exp_avg is (int|float)32 of"):
        checkpoints.load(3)


def test_a_header_that_promises_more_than_is_there_is_refused(checkpoints, place):
    checkpoints.save(state_at(3))
    header = json.dumps({"net.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    resign(place(3), "theta.safetensors", len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        checkpoints.load(3)


def test_where_none_is_good_the_run_does_not_start_again_from_nothing(checkpoints, place):
    for step in (3, 4):
        checkpoints.save(state_at(step))
        (place(step) / "state.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is intact"):
        load_latest(checkpoints)


def test_a_run_without_checkpoints_has_no_state(checkpoints):
    assert checkpoints.steps() == []
    assert load_latest(checkpoints) == (None, [])


def test_steps_are_in_the_order_of_numbers_and_other_names_do_not_count(checkpoints, directory):
    for step in (100_000_000, 20, 99_999_999):
        checkpoints.save(state_at(step))
    for name in ("step_20", "step_00000020.partial", "old_step_00000020", "best"):
        (directory.local / "checkpoints" / name).mkdir()
        (directory.local / "checkpoints" / name / "manifest.json").write_text("{}")
    assert checkpoints.steps() == [20, 99_999_999, 100_000_000]


def rewrite_manifest(place, change):
    """A manifest of the right form, with other entries."""
    path = place / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["sha256"])
    path.write_text(json.dumps(manifest, indent=2) + "\n")


@pytest.mark.parametrize(
    "name", ["../secret.json", "../../secret.json", "/secret.json", "a/../secret.json", "SECRET.json"]
)
def test_a_manifest_that_names_files_elsewhere_is_refused_before_they_are_read(checkpoints, place, directory, name):
    checkpoints.save(state_at(3))
    secret = b"{}"
    for where in (place(3).parent, directory.local, place(3)):
        (where / "secret.json").write_bytes(secret)
    rewrite_manifest(place(3), lambda digests: digests.update({name: hashlib.sha256(secret).hexdigest()}))
    with pytest.raises(CheckpointError, match=rf"manifest\.json names the file '{name}'"):
        checkpoints.load(3)


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_manifest_that_leaves_a_file_out_is_refused(checkpoints, place, name):
    checkpoints.save(state_at(3))
    rewrite_manifest(place(3), lambda digests: digests.pop(name))
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        checkpoints.load(3)


@pytest.mark.parametrize(
    "value", [None, [], 7, {}, {"sha256": 7}, {"format": 1, "sha256": [["a.json", "b"]]}, {"format": 2, "sha256": {}}]
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_that_is_no_manifest_is_refused(checkpoints, place, value, indent):
    checkpoints.save(state_at(3))
    (place(3) / "manifest.json").write_text(json.dumps(value, indent=indent) + "\n")
    with pytest.raises(CheckpointError, match=r"manifest\.json is torn or altered"):
        checkpoints.load(3)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_too_deep_to_parse_is_passed_over_as_any_other_damage(checkpoints, place, name):
    checkpoints.save(state_at(2))
    checkpoints.save(state_at(3))
    (place(3) / name).write_text("[" * 60_000)
    if name != "manifest.json":
        digest = hashlib.sha256((place(3) / name).read_bytes()).hexdigest()
        rewrite_manifest(place(3), lambda digests: digests.update({name: digest}))
    warnings = []
    assert checkpoints.load_latest(warnings.append).step == 2
    assert len(warnings) == 1


def test_a_checkpoint_under_another_steps_name_is_refused(checkpoints, place):
    checkpoints.save(state_at(3))
    place(3).rename(place(4))
    with pytest.raises(CheckpointError, match=r"state\.json is of another format or step"):
        checkpoints.load(4)


@pytest.mark.parametrize(
    ("shapes", "odd"),
    [
        ({"net.weight": (4, 3), "rate": (), "net.bias": (3,)}, "net.weight"),
        ({"net.weight": (3, 4), "net.bias": (3,)}, "rate"),
        ({"net.weight": (3, 4), "rate": (), "net.bias": (3,), "more": (1,)}, "more"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_parameter(checkpoints, directory, shapes, odd):
    checkpoints.save(state_at(3))
    with pytest.raises(CheckpointError, match=rf"theta does not fit this model: {odd}"):
        Checkpoints(directory, Layout(shapes), STATISTICS).load(3)


@pytest.mark.parametrize(
    ("keep", "best", "kept"), [(2, None, [5, 6]), (2, 3, [3, 5, 6]), (3, 6, [4, 5, 6]), (1, 1, [1, 6])]
)
def test_the_last_ones_and_the_best_are_kept(checkpoints, place, keep, best, kept):
    writer = CheckpointWriter(checkpoints, keep)
    for step in range(1, 7):
        writer.save(state_at(step), best if best is not None and best < step else None)
    writer.close()
    assert checkpoints.steps() == kept
    assert sorted(path.name for path in place(1).parent.iterdir()) == [f"step_{step:08d}" for step in kept]
    assert [bits_of(checkpoints.load(step)) for step in kept] == [bits_of(state_at(step)) for step in kept]


def test_damaged_later_checkpoints_do_not_push_out_the_one_just_written(checkpoints, place):
    for step in (3, 4, 5):
        checkpoints.save(state_at(step))
    (place(5) / "state.json").write_bytes(b"")
    writer = CheckpointWriter(checkpoints, keep=1)
    writer.save(state_at(4), None)
    writer.close()
    assert bits_of(checkpoints.load(4)) == bits_of(state_at(4))


def on_full_disk(directory, operations, error=errno.ENOSPC):
    """The same run directory, on a disk where so many more operations succeed."""
    failing = RunDirectory(directory.location)
    failing.file_system = fs.PyFileSystem(FullDisk(operations, error))
    return failing


@pytest.mark.parametrize("can_rename", [True, False])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_or_read_only_from_any_moment_on_leaves_older_checkpoints_as_they_were(
    directory, checkpoints, can_rename, error
):
    def save_with(operations):
        failing = on_full_disk(directory, operations, error)
        failing.is_local = can_rename
        Checkpoints(failing, THETA, STATISTICS).save(state_at(4))

    checkpoints.save(state_at(3))
    # To make the directory, and to open and write (and to rename) each file.
    needed = 1 + len(FILES) * (3 if can_rename else 2)
    for operations in range(needed):
        with pytest.raises(MetadistError, match=rf"could not be written \({os.strerror(error)}\)\. Free space"):
            save_with(operations)
        assert bits_of(load_latest(checkpoints)[0]) == bits_of(state_at(3))
        # The manifest comes last: before that nothing of the new one counts.
        assert checkpoints.steps() == [3] or (operations == needed - 1 and not can_rename)
    save_with(needed)
    assert bits_of(load_latest(checkpoints)[0]) == bits_of(state_at(4))


def test_a_disk_that_fails_while_old_ones_are_removed_leaves_the_newest_as_it_is(directory, checkpoints):
    for operations in (0, 1, 2, 3):
        for step in (3, 4, 5):
            checkpoints.save(state_at(step))
        with pytest.raises(MetadistError, match="could not be written"):
            Checkpoints(on_full_disk(directory, operations), THETA, STATISTICS).remove_old(keep=1, best=None)
        state, warnings = load_latest(checkpoints)
        assert bits_of(state) == bits_of(state_at(5))
        assert warnings == []
        # What is half removed does not count, and what counts is whole.
        assert [bits_of(checkpoints.load(step)) for step in checkpoints.steps()] == [
            bits_of(state_at(step)) for step in checkpoints.steps()
        ]


def test_an_error_in_the_background_comes_up_at_the_next_call_and_only_once(directory, checkpoints):
    failing = on_full_disk(directory, 0)
    writer = CheckpointWriter(Checkpoints(failing, THETA, STATISTICS), keep=2)
    writer.save(state_at(3), None)
    with pytest.raises(MetadistError, match="No space left on device"):
        writer.save(state_at(4), None)
    failing.file_system = fs.LocalFileSystem()
    writer.save(state_at(5), None)
    writer.close()
    assert checkpoints.steps() == [5]


def test_closing_raises_what_went_wrong_with_the_last_checkpoint(directory):
    writer = CheckpointWriter(Checkpoints(on_full_disk(directory, 0), THETA, STATISTICS), keep=2)
    writer.save(state_at(3), None)
    with pytest.raises(MetadistError, match="No space left on device"):
        writer.close()
