"""Promise 1 where training episodes have other shapes than test episodes, evaluation included."""

from pathlib import Path

import pytest

from metadist.algorithms import ProtoNet, Transfer
from metadist.config import Config
from tests.algorithms.embedding_based import unequal_ways
from tests.algorithms.pooled import tiny_run
from tests.distributed.test_same_bits import bits, fit

pytestmark = pytest.mark.ray


def other_ways(tmp_path: Path) -> Config:
    return unequal_ways(tmp_path, ProtoNet(), "running")


def mini_batches(tmp_path: Path) -> Config:
    return tiny_run(tmp_path, Transfer(inner_lr=0.3, inner_steps=4, fine_tune_body=True))


@pytest.mark.parametrize("make", [other_ways, mini_batches])
def test_two_adapters_give_the_bits_of_the_process_alone(local_ray: None, tmp_path: Path, make) -> None:
    config = make(tmp_path)
    assert bits(fit(config, 2, "with_2")) == bits(fit(config, 0, "alone"))
