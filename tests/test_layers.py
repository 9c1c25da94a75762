"""What may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "metadist"
MAY_IMPORT_RAY = ("distributed/", "tuning/", "jobs.py")


def imports_of(source: str) -> set[str]:
    """Top-level names of all modules that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_distributed_part_imports_ray(path: Path) -> None:
    if not str(path.relative_to(PACKAGE)).startswith(MAY_IMPORT_RAY):
        assert "ray" not in imports_of(path.read_text())


def test_the_finder_of_imports_sees_those_inside_functions() -> None:
    assert imports_of("def f():\n    from ray.util import x\n    import torch.nn as nn") == {"ray", "torch"}


def test_importing_metadist_and_training_in_process_loads_no_ray() -> None:
    code = (
        "import sys, metadist; assert 'torch' not in sys.modules;"
        "metadist.MetaTrainer, metadist.load_config, metadist.evaluate; assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_core_needs_nothing_of_the_rest_of_the_package() -> None:
    for path in (PACKAGE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metadist"):
                assert node.module.startswith(("metadist.core", "metadist.errors")), f"{path.name}: {node.module}"
