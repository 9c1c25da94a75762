"""Everything that a user can get wrong: one message with place, value and remedy, and nothing saved is lost."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from metadist.distributed.placement import Node, check_fits
from metadist.errors import ClusterError
from metadist.sections import ScalingSettings
from tests.bad_input.builders import (
    GOOD,
    RUN,
    Place,
    Prepare,
    evaluate,
    flip,
    resume,
    run,
    run_limited,
    sets,
    used_run,
)
from tests.bad_input.configs import WRONG_CONFIGS
from tests.bad_input.data import WRONG_DATA
from tests.bad_input.runs import DAMAGED_RUNS, FAILURES, HEALED, WRONG_COMMANDS, trained_then

AT_ONCE_S = 30.0

CASES = [
    pytest.param(*case, status, id=name)
    for cases, status in (
        (WRONG_CONFIGS, 2),
        (WRONG_DATA, 2),
        (WRONG_COMMANDS, 2),
        (DAMAGED_RUNS, 2),
        (FAILURES, 1),
        (HEALED, 0),
    )
    for name, case in cases.items()
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of the good config, with checkpoints of steps 1 and 2."""
    path = tmp_path_factory.mktemp("trained")
    (path / "good.yaml").write_text(GOOD)
    outcome = run(["train", str(path / "good.yaml"), "--run-dir", str(path / "x"), "--no-evaluate"])
    assert outcome.status == 0, outcome.said
    return path / "x"


@pytest.fixture
def place(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    return Place(tmp_path, trained)


def assert_says(text: str, message: str) -> None:
    """`message`'s parts, divided by ` ... `, stand in the text in their order."""
    position = 0
    for part in message.split(" ... "):
        found = text.find(part, position)
        assert found >= 0, f"{part!r} is not in (the rest of) what was said:\n{text}"
        position = found + len(part)


@pytest.mark.parametrize(("prepare", "message", "status"), CASES)
def test_what_is_wrong_is_named_with_a_remedy_and_nothing_saved_is_lost(
    prepare: Prepare, message: str, status: int, place: Place
) -> None:
    arguments = prepare(place)
    saved = place.files()
    began = time.monotonic()
    outcome = run(arguments)
    assert time.monotonic() - began < AT_ONCE_S
    assert "Traceback" not in outcome.said
    assert outcome.status == status, outcome.said
    assert_says(outcome.said, message)
    if status == 0:
        whole = {file.relative_to(place.trained): file.read_bytes() for file in place.trained.glob("checkpoints/*/*")}
        assert place.files() == {str(Path(RUN) / name): content for name, content in whole.items()}
    else:
        assert outcome.stdout == ""
        assert place.files() == saved


LARGE = ("model.hidden=[40, 40]", "run.log_every=1")
"""Checkpoints of 7 kB, and logs that grow with every step."""
FOUR_STEPS = (*LARGE, "training.steps=4")
MANY_STEPS = (*LARGE, "training.steps=40", "run.checkpoint_config.checkpoint_frequency=100")


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("bytes_at_most", "command", "unwritten"),
    [
        pytest.param(5000, resume(*sets(FOUR_STEPS)), "step_00000003/theta.safetensors", id="checkpoint"),
        pytest.param(2000, resume(*sets(MANY_STEPS)), "tensorboard", id="log"),
        pytest.param(5000, evaluate(), "evaluation.png", id="picture"),
    ],
)
def test_a_full_disk_costs_only_what_was_being_written(
    bytes_at_most: int, command: list[str], unwritten: str, place: Place
) -> None:
    trained_then(*LARGE, then=[])(place)
    saved = place.files()
    # A file that may not grow fails as one on a full disk does: the rest of a write is refused.
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_at_most}, {bytes_at_most}))"
    outcome = run_limited(limit, command, place)
    assert outcome.status == 1
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.said
    assert_says(outcome.said, f"{RUN} ... {unwritten}: could not be written (File too large). Free space")
    assert saved
    assert place.files() == saved
    assert not list(place.path.rglob("*.partial"))
    again = run(command)
    assert again.status == 0, again.said
    assert ("Going on from step 2" in again.said) == (command[0] == "train")
    if command[0] == "train":
        elsewhere = [*command[: command.index("--run-dir")], *command[command.index("--run-dir") + 2 :]]
        assert theta_of([*command, "--json"]) == theta_of([*elsewhere, "--json"])


def theta_of(command: list[str]) -> str:
    outcome = run(command)
    assert outcome.status == 0, outcome.said
    return str(json.loads(outcome.stdout)["theta_sha256"])


@pytest.mark.parametrize(
    ("locked", "status", "message"),
    [
        ("runs", 2, f"{RUN}: the run directory cannot be made (Permission denied). Choose another --run-dir."),
        (RUN, 1, f"{RUN}/lease.json: could not be written (Permission denied). Free space or correct permissions"),
    ],
    ids=["parent", "run directory"],
)
def test_a_place_that_may_not_be_written_is_refused(locked: str, status: int, message: str, place: Place) -> None:
    if locked == RUN:
        command = used_run(then=resume("--set", "training.steps=3"))(place)
    else:
        place.write(GOOD)
        (place.path / "runs").mkdir()
        command = resume()
    saved = place.files()
    (place.path / locked).chmod(0o555)
    try:
        # Root may write everywhere: PR_CAPBSET_DROP (24) of CAP_DAC_OVERRIDE (1) takes that from it.
        obey = "import ctypes; os.geteuid() or ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)"
        outcome = run_limited(obey, command, place)
    finally:
        (place.path / locked).chmod(0o755)
    assert "Traceback" not in outcome.said
    assert outcome.status == status, outcome.said
    assert_says(outcome.said, message)
    assert place.files() == saved
    assert run(command).status == 0


def test_damaged_later_checkpoints_do_not_push_out_the_good_one(place: Place) -> None:
    keep_one = ("run.checkpoint_config.num_to_keep=1", "run.checkpoint_config.checkpoint_frequency=5")
    command = trained_then("training.steps=3", then=resume(*sets(keep_one)))(place)
    flip("theta.safetensors", step=2)(place.path / RUN)
    flip("theta.safetensors", step=3)(place.path / RUN)
    # Goes on from step 1 to the config's step 2: the one checkpoint to keep is that, not the damaged one of step 3.
    assert run(command).status == 0
    outcome = run(evaluate("--json"))
    assert outcome.status == 0, outcome.said
    assert json.loads(outcome.stdout)["step"] == 2


def test_a_validation_that_diverges_is_told_and_does_not_stop_training(place: Place) -> None:
    # One inner step of this size is harmless, and 20 at test overflow float32.
    diverging = ("algorithm.inner_lr=20.0", "evaluation.inner_steps=20", "evaluation.every=1")
    place.write(GOOD)
    outcome = run(resume(*sets((*diverging, "evaluation.val_episodes=2", "training.steps=3")), "--json"))
    assert outcome.status == 0, outcome.said
    assert "step 3  validation loss nan" in outcome.said
    assert json.loads(outcome.stdout)["step"] == 3
    assert json.loads(run(evaluate("--json")).stdout)["loss"] == {"mean": None, "ci95": None}


NODES = [
    Node({"CPU": 2.0, "GPU": 1.0}, {"zone": "a"}),
    Node({"CPU": 1.5, "memory": 8.0}),
]


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (
            {"num_workers": 4},
            "4 adapters of CPU 1 each ... which has CPU 3.5 on 2 nodes: room for 3. Lower --workers to 3",
        ),
        ({"num_workers": 8, "resources_per_worker": {"CPU": 0.5}}, "CPU 0.5 each ... room for 7. Lower --workers to 7"),
        ({"num_workers": (2, 9), "use_gpu": True}, "2 adapters of CPU 1, GPU 1 each ... GPU 1 on 2 nodes: room for 1."),
        ({"num_workers": 1, "resources_per_worker": {"CPU": 3}}, "has CPU 3.5 on 2 nodes: room for 0."),
        ({"num_workers": 1, "resources_per_worker": {"TPU": 1}}, "adapters of TPU 1 each ... has TPU 0 on 2 nodes"),
        ({"num_workers": 3, "label_selector": {"zone": "a"}}, "has CPU 2 on 1 node of 2 with zone: a: room for 2."),
        ({"num_workers": 2, "label_selector": {"zone": "!a"}}, "has CPU 1.5 on 1 node of 2 with zone: !a: room for 1."),
        (
            {"num_workers": 1, "label_selector": {"zone": "in(b, c)"}},
            "on 0 nodes of 2 with zone: in(b, c): room for 0.",
        ),
        (
            {"num_workers": 4, "resources_per_worker": {"GPU": 0.3}},
            "GPU 0.3 each ... has GPU 1 on 2 nodes: room for 3.",
        ),
    ],
)
def test_adapters_that_do_not_fit_the_cluster_are_refused_before_they_start(scaling: dict, message: str) -> None:
    with pytest.raises(ClusterError) as refused:
        check_fits(ScalingSettings(**scaling), NODES, lambda: False)
    assert_says(str(refused.value), f"scaling.num_workers: ... {message}")
    check_fits(ScalingSettings(**scaling), NODES, lambda: True)


@pytest.mark.parametrize("workers", [3, (3, 64), 0])
def test_adapters_that_fit_the_cluster_are_not_refused(workers: int | tuple[int, int]) -> None:
    check_fits(ScalingSettings(num_workers=workers), NODES, lambda: False)
