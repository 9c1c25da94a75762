"""The README's program runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_program_in_the_readme_runs_and_learns_lines(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
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
