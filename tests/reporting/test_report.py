"""The page: valid, of one piece, the same again; and runs of which little is there."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

import metadist
from metadist.algorithms import MAML
from metadist.cli import cli
from metadist.errors import RunDirectoryError
from metadist.models import MLP
from metadist.reporting.explanation import has_captum
from metadist.reporting.report import Report
from metadist.sections import EvaluationSettings, TrainingSettings
from metadist.tasks import Sinusoid
from tests.builders import smooth_mlp
from tests.chromium import PROGRAM, visit
from tests.reporting.conftest import HOSTILE, config

VOID = {"meta", "link", "img", "br", "wbr"}


class Page(HTMLParser):
    """Tags in balance, ids, links, whatever could ask for something, and the text by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.external: list[str] = []
        self.text: dict[str, str] = {}
        self._section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
                self._section = value or ""
            if name == "href" and (value or "").startswith("#"):
                self.links.append((value or "")[1:])
            elif name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href") and not (
                value or ""
            ).startswith("data:"):
                self.external.append(f"{tag} {name}={value}")
            if name.startswith("on") or (name == "style" and "url(" in (value or "")):
                self.external.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + data


def page_of(report: Report) -> Page:
    return Page(Path(report.path).read_text())


@pytest.fixture(params=["sinusoid", "image"])
def report(request: pytest.FixtureRequest) -> Report:
    found: Report = request.getfixturevalue(f"{request.param}_report")
    return found


def test_the_page_is_well_formed_has_every_id_once_and_asks_for_nothing(report: Report) -> None:
    page = page_of(report)
    assert page.external == []
    assert set(page.ids.values()) == {1}
    assert set(page.links) == set(page.ids)
    assert not {"script", "iframe", "object", "embed", "form"} & page.tags.keys()
    style = re.search(r"<style>(.*?)</style>", Path(report.path).read_text(), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert (page.tags["html"], page.tags["main"], page.tags["h1"]) == (1, 1, 1)


def test_the_page_tells_what_the_run_directory_holds(sinusoid_report: Report, image_report: Report) -> None:
    for report, sections in ((sinusoid_report, {"rates"}), (image_report, {"calibration"})):
        page, record = page_of(report), report.findings.record
        shared = {"next", "training", "evaluation", "layers", "gradients", "tasks", "map", "environment"}
        explained = {"explanation"} if has_captum() and report is image_report else set()
        assert page.ids.keys() == shared | sections | explained
        assert record.fingerprint is not None
        assert record.fingerprint["canonical_gradient"] in page.text["environment"]
        assert record.config_text in page.text["environment"]
        for advice in report.advice:
            assert advice.text.replace("`", "") in page.text["next"]
    own = json.loads((Path(image_report.path).parent / "evaluation.json").read_text())["policies"][0]["per_inner_step"][
        2
    ]
    assert f"{100 * own['accuracy']['mean']:.1f} ± {100 * own['accuracy']['ci95']:.1f} %" in page.text[""]


def test_pictures_of_the_hardest_and_easiest_tasks_are_in_the_page(image_report: Report) -> None:
    page = page_of(image_report)
    # 6 tasks of 3 classes with 1 support and 2 query examples, an explanation with 2 pictures and 3 support examples.
    assert page.tags["img"] == 6 * 3 * 3 + (2 + 3) * has_captum()
    hostile = [
        n
        for n in image_report.findings.shown
        if HOSTILE
        in [
            c.name
            for c in image_report.findings.experiment.source.classes_of(  # type: ignore[union-attr]
                image_report.findings.adaptation.episodes[n].key  # type: ignore[union-attr]
            )
        ]
    ]
    assert hostile
    assert HOSTILE in page.text["tasks"]


def test_the_same_run_gives_the_same_page_to_the_byte(image_run: Path, image_report: Report) -> None:
    first = Path(image_report.path).read_bytes()
    metadist.report(str(image_run), episodes=12)
    assert Path(image_report.path).read_bytes() == first


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1100])
def test_in_a_browser_it_loads_nothing_complains_of_nothing_and_does_not_scroll_sideways(
    report: Report, width: int
) -> None:
    found = visit(Path(report.path), width, dark=width == 390)
    assert [url for url in found.requests if not url.startswith("data:")] == [Path(report.path).as_uri()]
    assert found.complaints == []
    assert found.wider == []
    assert found.scroll_width == width


def damaged(run: Path, place: Path, *lost: str) -> str:
    shutil.copytree(run, place / "run")
    for name in lost:
        path = place / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return str(place / "run")


@pytest.mark.parametrize(
    ("lost", "note", "without"),
    [
        (["evaluation.json"], "There is no evaluation yet: `metadist evaluate", {"evaluation"}),
        (["tensorboard"], "There are no TensorBoard events", set()),
        (["fingerprint.json"], "fingerprint.json is missing", set()),
        (
            ["checkpoints", "evaluation.json"],
            "There is no checkpoint yet",
            {"evaluation", "layers", "gradients", "tasks", "map", "rates"},
        ),
        (["metrics.jsonl"], "No training step was logged yet.", {"training"}),
    ],
)
def test_what_is_missing_is_said_and_its_section_left_out(
    lost: list[str], note: str, without: set[str], sinusoid_run: Path, tmp_path: Path
) -> None:
    report = metadist.report(damaged(sinusoid_run, tmp_path, *lost), episodes=3)
    assert any(each.startswith(note) for each in report.findings.notes), report.findings.notes
    page = page_of(report)
    everything = {"next", "training", "evaluation", "layers", "gradients", "rates", "tasks", "map", "environment"}
    assert page.ids.keys() == everything - without


def test_a_pool_that_is_gone_leaves_what_was_recorded(image_run: Path, tmp_path: Path) -> None:
    run = damaged(image_run, tmp_path)
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(text.replace(str(image_run.parent / "pool.parquet"), "gone.parquet"))
    report = metadist.report(run)
    assert report.findings.notes[0].startswith(
        "Nothing was computed from the checkpoint: gone.parquet: no such class pool."
    )
    assert {"training", "evaluation", "calibration"} <= page_of(report).ids.keys()


def test_a_run_that_diverges_at_test_has_a_report_that_says_so(tmp_path: Path) -> None:
    wild = config(
        tmp_path,
        "wild",
        task=Sinusoid(shots=5, queries=6),
        model=MLP(hidden=(8,)),
        algorithm=MAML(inner_lr=20.0),
        training=TrainingSettings(steps=1, meta_batch_size=2),
        evaluation=EvaluationSettings(episodes=8, inner_steps=30),
    )
    done = metadist.MetaTrainer(wild).fit()
    assert done.evaluation is not None
    assert done.evaluation.as_dict()["loss"]["mean"] is None
    report = metadist.report(done.run_dir, episodes=8)
    assert "diverged" in [advice.rule for advice in report.advice]
    page = page_of(report)
    assert "not finite" in page.text[""]
    assert not re.findall(r'(?:x|y|x1|x2|y1|y2|cx|cy|points|height|width)="[^"]*nan', Path(report.path).read_text())


def test_a_model_of_ones_own_is_told_of_and_given_back_in_python(tmp_path: Path) -> None:
    own = config(
        tmp_path,
        "run",
        task=Sinusoid(shots=3, queries=4),
        model=smooth_mlp(Sinusoid().spec),
        algorithm=metadist.load_config("configs/sinusoid_maml.yaml").algorithm,
        training=TrainingSettings(steps=2, meta_batch_size=2),
        evaluation=EvaluationSettings(episodes=4),
    )
    done = metadist.MetaTrainer(own).fit()
    told = metadist.report(done.run_dir)
    assert "model of this run was an object of the program that made it" in told.findings.notes[0]
    assert "Sequential" in page_of(told).text[""]
    assert "layers" not in page_of(told).ids
    assert "layers" in page_of(metadist.report(done.run_dir, episodes=3, config=own)).ids


def test_no_run_directory_and_a_step_without_checkpoint_are_refused(sinusoid_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"is no run directory: it holds no config\.yaml"):
        metadist.report(str(tmp_path))
    with pytest.raises(RunDirectoryError, match="has no checkpoint of step 5; it has 12"):
        metadist.report(str(sinusoid_run), step=5)


def test_the_command_names_the_page_and_prints_one_json_object(sinusoid_run: Path) -> None:
    done = CliRunner().invoke(cli, ["report", str(sinusoid_run), "--episodes", "12"])
    assert done.exit_code == 0, done.output
    assert f"report   {sinusoid_run}/report.html" in done.stdout
    as_json = CliRunner().invoke(cli, ["report", str(sinusoid_run), "--episodes", "12", "--json"])
    found = json.loads(as_json.stdout)
    assert (found["report"], found["step"], found["episodes"]) == (f"{sinusoid_run}/report.html", 12, 12)
    assert [layer["layer"] for layer in found["layers"]] == ["1", "3", "5"]
    wrong = CliRunner().invoke(cli, ["report", str(sinusoid_run / "nothing")])
    assert wrong.exit_code == 2
    assert "Traceback" not in wrong.output
