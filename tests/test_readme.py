"""The README's program runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def programs(containing: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return [program for program in found if containing in program]


def test_the_program_in_the_readme_runs_and_learns_lines(tmp_path: Path) -> None:
    (program,) = programs("class Lines")
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Lines with slope and offset in [0, 1] have a variance of 1/12 + 1/12 * 1/3 = 0.11 about their mean; a model
    # that adapts does much better.
    mean = float(re.search(r"'mean': ([0-9.]+)", done.stdout)[1])
    assert mean < 0.05
    assert (tmp_path / "runs/metadist/evaluation.json").exists()


def test_every_file_that_the_readme_names_exists() -> None:
    text = README.read_text()
    for name in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"configs/[a-z0-9_]+\.yaml", text):
        assert (README.parent / name).exists(), name


@pytest.mark.ray
@pytest.mark.head
@pytest.mark.long
def test_the_tuner_in_the_readme_runs(tmp_path: Path) -> None:
    (program,) = programs("tune.Tuner(")
    (tmp_path / "configs").symlink_to(README.parent / "configs")
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.splitlines()[-1]) < 10
    # Two trials, each with a run directory of its own.
    assert len(list((tmp_path / "runs/my_tuner").rglob("checkpoints/step_00000200/manifest.json"))) == 2
