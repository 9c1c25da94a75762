"""A comparison's scores, differences and calibration do not depend on how many adapters there are."""

from pathlib import Path

import pytest

import metadist
from tests.test_comparison import Place

pytestmark = pytest.mark.ray


def test_a_comparison_has_the_same_bits_with_two_adapters(local_ray: None, tmp_path: Path) -> None:
    def compared(workers: int) -> tuple[dict, list[bytes]]:
        (tmp_path / str(workers)).mkdir()
        place = Place(tmp_path / str(workers))
        paths = [place.config("slow", inner_lr=0.01), place.config("fast", inner_lr=0.5)]
        found = metadist.compare(paths, episodes=13, num_workers=workers)
        plain = found.as_dict()
        for row in plain["runs"]:
            del row["run_dir"]
        arrays = [run.evaluation.policies[0].episode_accuracy.tobytes() for run in found.runs]
        return plain | {"bins": [run.evaluation.policies[0].calibration for run in found.runs]}, arrays

    assert compared(2) == compared(0)
