"""Whatever is read back may hold anything: an error of ours with a message, or a value; never a traceback or a hang.

FUZZ_CASES=10000 for the long run (`make fuzz`).
"""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import metadist
from metadist import MetaTrainer
from metadist.cli import cli
from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.plan import Plan, Range
from metadist.distributed.adapter import Adapter
from metadist.errors import MetadistError, UserError
from metadist.experiment import check_splits, make_experiment
from metadist.models import MLP
from tests.bad_input.builders import GOOD, vectors
from tests.builders import tiny_config

CASES = int(os.environ.get("FUZZ_CASES", "120")) // 4
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

# No number between what is small and what is refused at once: a model of a million units is no mistake, and slow.
NUMBERS = st.sampled_from([-(10**18), -1, 0, 1, 2, 3, 8, 2**63, 10**18, 10**400]) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["mlp", "maml", "auto", "1e-3"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value within a nested one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, below in inner for place in [(*path, key), *places(below, (*path, key))]]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A nested value with up to three of its parts replaced, removed or joined by another."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(places(value)))
        section = value
        for key in above:
            section = section[key]
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace":
            section[last] = draw(VALUES)
        elif what == "remove" and len(section) > 1:
            del section[last]
        elif isinstance(section, dict):
            section[draw(st.text(max_size=6))] = draw(VALUES)
    return value


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's bytes, cut, grown, flipped or replaced."""
    at = draw(st.integers(0, max(0, len(content) - 1)))
    what = draw(st.sampled_from(["cut", "grow", "flip", "overwrite", "other"]))
    if what == "cut":
        return content[:at]
    if what == "grow":
        return content[:at] + draw(st.binary(max_size=40)) + content[at:]
    if what == "flip":
        return content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :] if content else b""
    if what == "overwrite":
        rest = draw(st.binary(max_size=40))
        return content[:at] + rest + content[at + len(rest) :]
    return draw(st.binary(max_size=60))


def command(*arguments: str) -> tuple[int, str]:
    """Status and everything said; a traceback is raised."""
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    return result.exit_code, result.output


def message_of(function: Callable[[], Any]) -> str | None:
    """What an error of ours says; None where there is none. Any other error is raised."""
    try:
        function()
    except MetadistError as error:
        return str(error)
    return None


@given(data=st.data())
@fuzz
def test_any_config_is_taken_or_refused_with_a_message(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(self: MetaTrainer, **_: Any) -> None:
        """As far as `fit` goes before it computes anything."""
        experiment = make_experiment(self.config)
        check_splits(experiment.source, self.config.training.seed, ["train"])
        raise UserError("it is taken")

    monkeypatch.setattr(MetaTrainer, "fit", look)
    monkeypatch.chdir(tmp_path)
    if data.draw(st.booleans()):
        text = yaml.safe_dump(data.draw(changed(yaml.safe_load(GOOD))), allow_unicode=True).encode("utf-8", "replace")
    else:
        text = data.draw(spoiled(GOOD.encode()))
    Path("fuzzed.yaml").write_bytes(text)
    status, said = command("train", "fuzzed.yaml", "--workers", "0")
    event("taken" if "it is taken" in said else "refused")
    assert status == 2
    assert said.count("Error: ") >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["fuzzed.yaml"]


@given(data=st.data())
@fuzz
def test_any_pool_is_read_or_refused_with_a_message(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pool.parquet"
    if data.draw(st.booleans()):
        rows = data.draw(changed(vectors()))
        try:
            table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
            pq.write_table(table, file)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeEncodeError):
            return  # Nothing that Parquet can hold.
    else:
        pq.write_table(pa.Table.from_pylist(vectors()), file)
        file.write_bytes(data.draw(spoiled(file.read_bytes())))
    status, said = command("data", "inspect", "pool.parquet")
    assert status in (0, 2), said
    event("taken" if status == 0 else "refused")
    assert (status == 0) or "pool.parquet" in said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of two steps."""
    place = tmp_path_factory.mktemp("trained")
    (place / "good.yaml").write_text(GOOD)
    status, said = command("train", str(place / "good.yaml"), "--run-dir", str(place / "x"), "--no-evaluate")
    assert status == 0, said
    return place / "x"


READ_BACK = (".yaml", ".json", ".safetensors")


@given(data=st.data())
@fuzz
def test_any_run_directory_is_loaded_or_refused_with_a_message(
    data: st.DataObject, tmp_path: Path, trained: Path
) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(trained, run)
    names = [str(path.relative_to(run)) for path in sorted(run.rglob("*")) if path.suffix in READ_BACK]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True)):
        file = run / name
        if file.suffix == ".json" and data.draw(st.booleans()):
            value = data.draw(changed(json.loads(file.read_text())))
            file.write_text(json.dumps(value, indent=2) + "\n")
        else:
            file.write_bytes(data.draw(spoiled(file.read_bytes())))
    before = {path.name for path in tmp_path.iterdir()}
    loaded: list[Any] = []
    said = message_of(lambda: loaded.append(metadist.load(str(run))))
    # What is loaded is what one of the two checkpoints held, to the bit.
    whole = [metadist.load(str(trained), step=step).theta for step in (1, 2)]
    assert all(any(torch.equal(run.theta, theta) for theta in whole) for run in loaded)
    event("refused" if said else "taken")
    assert said is None or str(run) in said or "config.yaml" in said or "task." in said, said
    assert {path.name for path in tmp_path.iterdir()} == before


SIZES = st.sampled_from([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 0])
SHAPES = st.lists(SIZES, min_size=1, max_size=2).map(tuple) | st.lists(SIZES, max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64])


@dataclasses.dataclass
class Drawn:
    """A source whose spec and whose episodes were drawn, and may not fit each other."""

    spec: EpisodeSpec
    parts: list

    def sample(self, keys):
        support, query = (Examples(*(self._tensor(len(keys), *part) for part in pair)) for pair in self.parts)
        return EpisodeBatch(support, query)

    def _tensor(self, tasks, shape, dtype, fill):
        if shape is None:
            return fill
        return torch.full((tasks, *shape), fill).to(dtype)


@given(data=st.data())
@fuzz
def test_any_episode_is_learned_from_or_refused_with_a_message(data: st.DataObject) -> None:
    spec = EpisodeSpec(
        kind=data.draw(st.sampled_from(["classification", "regression"])),
        input_shape=data.draw(SHAPES),
        output_size=data.draw(SIZES),
        support_size=data.draw(SIZES),
        query_size=data.draw(SIZES),
    )
    parts = []
    for size in (spec.support_size, spec.query_size):
        y_shape = (size,) if spec.kind == "classification" else (size, spec.output_size)
        y_dtype = torch.int64 if spec.kind == "classification" else torch.float32
        pair = [((size, *spec.input_shape), torch.float32), (y_shape, y_dtype)]
        for number, (shape, dtype) in enumerate(pair):
            # Often as the spec says: what fits is to be learned from.
            if data.draw(st.integers(0, 9)) == 9:
                shape, dtype = data.draw(st.none() | SHAPES), data.draw(DTYPES)
            fill = data.draw(st.sampled_from([0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 3.0, -1.0, 1e30, float("nan")]))
            pair[number] = (shape, dtype, 0.0 if dtype == torch.int64 and not np.isfinite(fill) else fill)
        parts.append(pair)

    def learn() -> None:
        experiment = make_experiment(tiny_config(task=Drawn(spec, parts), model=MLP(hidden=(3,))))
        Adapter(experiment).sum_range(Plan(0, "train", 0, 2, 2), Range(0, 1), experiment.initial_theta)

    said = message_of(learn)
    event("refused" if said else "taken")
    assert said is None or len(said) > 20
