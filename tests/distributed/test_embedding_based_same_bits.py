"""Promise 1 for algorithms that work on embeddings, whose training and test episodes have other ways."""

from pathlib import Path

import pytest

from metadist.algorithms import R2D2, MatchingNet, ProtoNet
from metadist.core.algorithm import Algorithm
from tests.algorithms.embedding_based import fit, unequal_ways
from tests.distributed.test_same_bits import bits

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("algorithm", [ProtoNet(), MatchingNet(), R2D2()], ids=str)
def test_two_adapters_give_the_bits_of_the_process_alone(local_ray: None, tmp_path: Path, algorithm: Algorithm) -> None:
    config = unequal_ways(tmp_path, algorithm, "running")
    assert bits(fit(config, 2)) == bits(fit(config, 0))
