"""Every algorithm's run has a report that says what applies to it."""

from pathlib import Path

import pytest

import metadist
from metadist.algorithms import ALGORITHMS
from metadist.models import MLP, Conv4
from metadist.reporting import explanation, gradients
from metadist.sections import EvaluationSettings, TrainingSettings
from metadist.tasks import TASKS, FunctionShapes
from tests.distributed.test_every_algorithm import ON_POOLED_CLASSES, SETTINGS
from tests.reporting.conftest import config, image_pool
from tests.reporting.test_report import page_of

WITHOUT_INNER_STEPS = ("proto_net", "matching_net", "r2d2", "nearest_centroid")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return image_pool(tmp_path_factory.mktemp("pool"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_report_of_what_it_does(
    name: str, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer meta-gradients, and an explanation from fewer points: this test is about what applies, not how exactly.
    monkeypatch.setattr(gradients, "TASKS", 4)
    monkeypatch.setattr(explanation, "PATH_STEPS", 4)
    task = "pooled_classes" if name in ON_POOLED_CLASSES else "few_shot"
    sizes = {"batch_size": 6} if task == "pooled_classes" else {}
    policy = "per_step" if name == "maml_plus_plus" else "running" if name == "r2d2" else "support"
    few = {"inner_steps": 2} if "inner_steps" in ALGORITHMS[name].__dataclass_fields__ else {}
    made = config(
        tmp_path,
        name,
        task=TASKS[task](pool=pool, ways=3, shots=1, queries=2, **sizes),
        model=Conv4(filters=3, downsample="stride"),
        algorithm=ALGORITHMS[name](**SETTINGS.get(name, {}), **few),
        training=TrainingSettings(steps=1, meta_batch_size=2, batch_norm=policy, compile=False),
        evaluation=EvaluationSettings(episodes=4),
    )
    report = metadist.report(metadist.MetaTrainer(made).fit().run_dir, episodes=4)
    findings, page = report.findings, page_of(report)
    assert page.external == []
    assert findings.adaptation is not None
    moved = {m.layer.name for m in findings.adaptation.movements if m.change and m.change["mean"] > 0}
    bodies, head = {"block1", "block2", "block3", "block4"}, {"head"}
    expected = {"anil": head, "boil": bodies, "cavia": {"block3"}, "transfer": set()}
    adapts = set() if name in WITHOUT_INNER_STEPS else expected.get(name, bodies | head)
    assert moved == adapts
    assert (findings.alignment is None) == (name == "scratch")
    rates = name in ("meta_sgd", "maml_plus_plus")
    assert ("rates" in page.ids) == (findings.rates is not None) == rates
    assert ("no layer moves" in page.text["layers"]) == (name in WITHOUT_INNER_STEPS)


def test_tasks_of_several_families_are_coloured_by_family(tmp_path: Path) -> None:
    made = config(
        tmp_path,
        "shapes",
        task=FunctionShapes(),
        model=MLP(hidden=(6,)),
        algorithm=ALGORITHMS["maml"](),
        training=TrainingSettings(steps=1, meta_batch_size=2),
        evaluation=EvaluationSettings(episodes=4),
    )
    report = metadist.report(metadist.MetaTrainer(made).fit().run_dir, episodes=20)
    page = page_of(report)
    assert "Coloured by family." in page.text["map"]
    for family in set(report.findings.families):
        assert family is not None
        assert family in page.text["map"]
    assert "squared error" in page.text["tasks"]
