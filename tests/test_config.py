"""Reading configs, writing them, and telling two runs apart. Wrong ones: test_bad_input.py."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from metadist.algorithms import MAML
from metadist.config import Config, config_from_document, config_to_dict, differences, load_config
from metadist.config_file import dump_yaml, parse_document
from metadist.errors import ConfigError
from metadist.models import MLP
from metadist.sections import ScalingSettings, TrainingSettings
from metadist.tasks import Sinusoid
from tests.bad_input.builders import run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SMALL = {"task": {"name": "sinusoid"}, "model": {"name": "mlp"}, "algorithm": {"name": "maml"}}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(dump_yaml(SMALL))
    return path


def read(text: str) -> Config:
    return config_from_document(parse_document(text, "text.yaml"))


def as_lists(value: Any) -> Any:
    """Tuples as lists, as YAML has them."""
    return json.loads(json.dumps(value))


def test_there_are_configs_to_read() -> None:
    assert {"sinusoid_maml.yaml", "omniglot_5w1s_maml.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_means_what_it_says(path: Path) -> None:
    config = load_config(path)
    written = yaml.safe_load(path.read_text())
    assert config.run.name == written.get("run", {}).get("name", path.stem)
    for section, keys in written.items():
        values = as_lists(dataclasses.asdict(getattr(config, section)))
        for key, value in keys.items():
            if isinstance(value, dict):
                assert value.items() <= values[key].items()
            elif key != "name":
                assert values[key] == value, f"{section}.{key}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_is_read_again_from_the_run_directory(path: Path) -> None:
    config = load_config(path)
    assert read(dump_yaml(config_to_dict(config))) == config


def test_every_value_survives_being_written_and_read(small: Path) -> None:
    changes = [
        "task.shots=7",
        "model.hidden=[3, 4, 5]",
        "model.batch_norm=true",
        "algorithm.order=first",
        "algorithm.inner_lr=1e-7",
        "outer.betas=[0.5, 0.75]",
        "outer.clip_norm=0.1",
        "training.seed=9223372036854775807",
        "training.batch_norm=running",
        "training.compile=false",
        "evaluation.inner_steps=0",
        "scaling.num_workers=[2, 5]",
        "scaling.resources_per_worker={CPU: 0.5, TPU: 2}",
        "scaling.address='127.0.0.1:6379'",
        "run.name='2024-05-01'",
        "run.storage_path='a: b # c'",
        "run.failure_config.max_failures=-1",
    ]
    config = load_config(small, changes)
    assert config.scaling.num_workers == (2, 5)
    assert config.run.storage_path == "a: b # c"
    assert read(dump_yaml(config_to_dict(config))) == config


def test_overrides_come_last_in_order_and_may_name_sections_that_the_file_has_not(small: Path) -> None:
    overrides = ["training.steps=5", "training.steps=6", "run.checkpoint_config.num_to_keep=9", "outer.clip_norm="]
    config = load_config(small, overrides)
    assert config.training.steps == 6
    assert config.run.checkpoint_config.num_to_keep == 9
    assert config.run.checkpoint_config.checkpoint_frequency == 1000
    assert config.outer.clip_norm is None
    assert config.run.name == "small"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E-3", 0.001),
        ("1.5e3", 1500.0),
        ("+2e-2", 0.02),
        ("1e+2", 100.0),
        ("0.001", 0.001),
        ("3", 3.0),
    ],
)
def test_a_number_is_read_as_everybody_writes_it(text: str, value: float, small: Path) -> None:
    assert load_config(small, [f"algorithm.inner_lr={text}"]).algorithm.inner_lr == value
    assert parse_document(f"a: {text}", "f").data == {"a": value}


@pytest.mark.parametrize("text", ["e3", "1e", "1e3x", "e-3", "2024-05-01", "1.2.3", "'1e-3'"])
def test_what_is_no_number_stays_text(text: str) -> None:
    assert parse_document(f"a: {text}", "f").data == {"a": text.strip("'")}


LINES = """\
# A comment, and an empty line.

task: {name: sinusoid,
  shots: 3}
model:
  name: mlp
  hidden:
    - 4

    - 5
run:

  checkpoint_config:
    num_to_keep: 2
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("task", 3),
        ("task.name", 3),
        ("task.shots", 4),
        ("model.name", 6),
        ("model.hidden.0", 8),
        ("model.hidden.1", 10),
        ("run.checkpoint_config.num_to_keep", 14),
        ("run.checkpoint_config.checkpoint_frequency", 13),
        ("model.batch_norm", 5),
    ],
)
def test_a_key_knows_its_line_and_a_missing_one_that_of_its_section(path: str, line: int) -> None:
    keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
    assert parse_document(LINES, "f.yaml").place(keys) == f" (f.yaml, line {line})"


def test_an_override_is_named_as_the_place_of_what_it_set() -> None:
    document = parse_document(LINES, "f.yaml")
    document.override("model.hidden=[0]")
    document.override("outer.lr=-1")
    assert document.place(("model", "hidden", 0)) == " (--set)"
    assert document.place(("outer", "lr")) == " (--set)"
    assert document.place(("model", "name")) == " (f.yaml, line 6)"
    assert document.place(("training",)) == " (f.yaml)"


COSINE = ("outer.schedule=cosine",)


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ((), (), []),
        ((), ("scaling.num_workers=[3, 7]", "scaling.address='h:1'", "scaling.placement_strategy=SPREAD"), []),
        ((), ("run.name=other", "run.storage_path=elsewhere", "run.checkpoint_config.num_to_keep=1"), []),
        ((), ("evaluation.episodes=7", "evaluation.every=3"), []),
        ((), ("training.steps=2000",), []),
        (COSINE, (*COSINE, "training.steps=2000"), ["training.steps: 1000 there, 2000 here"]),
        ((), ("training.seed=1",), ["training.seed: 0 there, 1 here"]),
        ((), ("training.chunk_size=1",), ["training.chunk_size: None there, 1 here"]),
        ((), ("task.shots=3",), ["task.shots: 10 there, 3 here"]),
        ((), ("model.hidden=[3]",), ["model.hidden: [40, 40] there, [3] here"]),
        ((), ("algorithm.order=first",), ["algorithm.order: 'second' there, 'first' here"]),
        ((), ("scaling.threads_per_worker=2",), ["scaling.threads_per_worker: 1 there, 2 here"]),
        (
            ("outer.lr=0.1",),
            ("outer.lr=0.2", "task.queries=1"),
            ["task.queries: 10 there, 1 here", "outer.lr: 0.1 there, 0.2 here"],
        ),
    ],
)
def test_two_configs_differ_in_what_touches_the_bits_of_a_step(
    before: tuple[str, ...], now: tuple[str, ...], found: list[str], small: Path
) -> None:
    saved, asked = (config_to_dict(load_config(small, overrides)) for overrides in (before, now))
    # As it comes back from config.yaml.
    assert differences(yaml.safe_load(dump_yaml(saved)), asked) == found


def test_a_config_of_another_kind_of_task_differs_in_its_name_and_keys(small: Path) -> None:
    saved = config_to_dict(load_config(small))
    asked = config_to_dict(load_config(small, ["task.name=function_shapes", "task.noise=0.5"]))
    assert differences(saved, asked) == [
        "task.name: 'sinusoid' there, 'function_shapes' here",
        "task.noise: None there, 0.5 here",
    ]


@pytest.mark.parametrize("section", ["task", "algorithm", "training", "scaling"])
def test_a_saved_config_that_lost_a_section_is_never_taken_for_the_same_run(section: str, small: Path) -> None:
    asked = config_to_dict(load_config(small))
    saved = {name: keys for name, keys in asked.items() if name != section}
    with pytest.raises(KeyError):
        differences(saved, asked)


def test_a_config_made_in_python_is_held_to_the_same_rules() -> None:
    parts = {"task": Sinusoid(), "model": MLP(), "algorithm": MAML()}
    with pytest.raises(ConfigError, match=r"^training\.chunk_size must be at most .* = 4, got 8\. Lower it\.$"):
        Config(**parts, training=TrainingSettings(meta_batch_size=4, chunk_size=8))
    with pytest.raises(ConfigError, match=r"^scaling\.num_workers .* got \(3, 1\)\. Swap them\.$"):
        Config(**parts, scaling=ScalingSettings(num_workers=(3, 1)))


def test_an_object_of_a_program_is_named_in_the_saved_config_and_refused_by_the_command_line() -> None:
    config = Config(task=Sinusoid(), model=nn.Linear(1, 1), algorithm=MAML())
    saved = config_to_dict(config)
    assert saved["model"] == {"name": "(object of your program)", "class": "Linear"}
    with pytest.raises(ConfigError, match=r"model was an object of the program .*\(Linear\).*metadist\.models\."):
        read(dump_yaml(saved))


MODULE = '''
import metadist
from metadist.algorithms import MAML
from metadist.models import MLP
from metadist.tasks import Sinusoid


@metadist.settings
class Halved(MAML):
    """MAML with a setting of its own."""

    half: bool = True


@metadist.settings
class Wide(MLP):
    factor: int = 2


@metadist.settings
class Shifted(Sinusoid):
    shift: float = 0.0


class Plain:
    pass
'''


def install(path: Path, monkeypatch: pytest.MonkeyPatch, entries: dict[str, str], module: str = MODULE) -> None:
    """A distribution with a module `plugin_of_a_test` and these entry points, on this process's path."""
    (path / "plugin_of_a_test.py").write_text(module)
    info = path / "plugin_of_a_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-test\nVersion: 1.0\n")
    lines = [f"[metadist.{group}]\n{entry}\n" for group, entry in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(path))
    monkeypatch.delitem(sys.modules, "plugin_of_a_test", raising=False)


def test_a_config_names_what_an_installed_package_declares(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        tmp_path,
        monkeypatch,
        {
            "algorithms": "halved = plugin_of_a_test:Halved",
            "models": "wide = plugin_of_a_test:Wide",
            "tasks": "shifted = plugin_of_a_test:Shifted",
        },
    )
    monkeypatch.chdir(tmp_path)
    names = ["task.name=shifted", "model.name=wide", "algorithm.name=halved"]
    config = load_config(small, [*names, "task.shift=2.0", "model.factor=3", "algorithm.half=false"])
    assert (config.task.shift, config.model.factor, config.algorithm.half) == (2.0, 3, False)
    assert config_to_dict(config)["algorithm"]["name"] == "halved"
    assert read(dump_yaml(config_to_dict(config))) == config
    with pytest.raises(ConfigError, match=r"algorithm\.halve is not a known key .* Did you mean algorithm\.half\?"):
        load_config(small, [*names, "algorithm.halve=true"])
    short = ["training.steps=1", "training.meta_batch_size=1", "model.hidden=[4]"]
    sets = [part for assignment in (*names, *short) for part in ("--set", assignment)]
    outcome = run(["train", str(small), *sets, "--workers", "0", "--no-evaluate"])
    assert outcome.status == 0, outcome.said


@pytest.mark.parametrize(
    ("entry", "module", "message"),
    [
        ("maml = plugin_of_a_test:Halved", MODULE, r"'maml'.*takes a name that is already used\. Rename it"),
        ("mine = plugin_of_a_test:Absent", MODULE, r"'mine'.*cannot be loaded: AttributeError.*uninstall"),
        ("mine = plugin_of_a_test:Halved", "1 / 0", r"'mine'.*cannot be loaded: ZeroDivisionError.*uninstall"),
        ("mine = plugin_of_a_test:Plain", MODULE, r"'mine'.*must be a dataclass of settings.*@metadist\.settings"),
    ],
    ids=["name taken", "not there", "module that fails", "no dataclass"],
)
def test_an_entry_point_that_cannot_be_used_is_named(
    entry: str, module: str, message: str, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, {"algorithms": entry}, module)
    with pytest.raises(ConfigError, match=message):
        load_config(small)


def test_a_config_names_what_the_project_in_the_current_directory_declares_installed_or_not(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_of_a_test.py").write_text(MODULE)
    (tmp_path / "pyproject.toml").write_text(
        '[project.entry-points."metadist.algorithms"]\nhalved = "plugin_of_a_test:Halved"\n'
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "plugin_of_a_test", raising=False)
    with pytest.raises(ConfigError, match=r"algorithm\.name must be one of"):
        load_config(small, ["algorithm.name=halved"])
    monkeypatch.chdir(tmp_path)
    assert load_config(small, ["algorithm.name=halved"]).algorithm.half
    install(tmp_path, monkeypatch, {"algorithms": "halved = plugin_of_a_test:Halved"})
    assert load_config(small, ["algorithm.name=halved"]).algorithm.half
    (tmp_path / "pyproject.toml").write_text("[project")
    with pytest.raises(ConfigError, match=r"pyproject\.toml in this directory is not valid TOML \(.*declaration"):
        load_config(small)
