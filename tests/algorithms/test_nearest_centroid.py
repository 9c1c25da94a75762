import dataclasses

import pytest
import torch

from metadist.algorithms import NearestCentroid
from metadist.core.episode import Examples
from metadist.errors import ConfigError, ModelError
from metadist.evaluation import evaluate
from metadist.experiment import make_experiment
from metadist.sections import EvaluationSettings
from metadist.tasks import FewShot
from metadist.training import MetaTrainer
from tests.algorithms.contracts import check_algorithm, check_derivatives_along_directions
from tests.algorithms.pooled import (
    AtTest,
    check_training_is_that_of_a_plain_classifier,
    tiny_run,
    training_images,
    training_points,
)


def test_nearest_centroid_fulfils_the_contract():
    check_algorithm(NearestCentroid, {}, problems=(training_points,))
    check_algorithm(NearestCentroid, {}, problems=(training_images,), exact=False)
    check_derivatives_along_directions(*training_images(NearestCentroid()))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_training_is_that_of_a_plain_classifier(label_smoothing):
    check_training_is_that_of_a_plain_classifier(NearestCentroid(), label_smoothing)


@pytest.mark.parametrize("images", [False, True])
def test_logits_are_distances_to_the_mean_of_each_classs_unit_vectors(images):
    at_test = AtTest(NearestCentroid(), images=images)
    for task in range(2):
        support, query = (Examples(part.x[task], part.y[task]) for part in at_test.batch)
        (phi,) = at_test.algorithm.adapt(at_test.network, at_test.meta, support, 0)
        found = at_test.algorithm.predict(at_test.network, phi, support, query.x)
        with torch.no_grad():
            # As in training: batch norm by the set's own statistics.
            embedded = [[f / sum(f * f) ** 0.5 for f in at_test.module.train()(part.x)] for part in (support, query)]
        expected = torch.zeros(6, 3, dtype=torch.float64)
        for way in range(3):
            centroid = sum(f for f, y in zip(embedded[0], support.y, strict=True) if y == way) / 2
            for number, f in enumerate(embedded[1]):
                expected[number, way] = -sum((f - centroid) ** 2)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_only_the_direction_of_an_embedding_counts():
    at_test = AtTest(NearestCentroid())
    support, query = (Examples(part.x[0], part.y[0]) for part in at_test.batch)
    last = list(at_test.module.state_dict())[-2:]
    outputs = []
    for scale in (1.0, 7.0):
        meta = at_test.meta | {name: scale * at_test.meta[name] for name in last}
        (phi,) = at_test.algorithm.adapt(at_test.network, meta, support, 0)
        outputs.append(at_test.algorithm.predict(at_test.network, phi, support, query.x))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", ["running", "per_step", "support", "transductive"])
def test_a_run_trains_and_is_evaluated_without_inner_steps(tmp_path, policy):
    result = MetaTrainer(tiny_run(tmp_path, NearestCentroid(), policy)).fit()
    assert result.step == 3
    assert result.evaluation.inner_steps == 0
    # Squared distances of unit vectors lie in [0, 4]: a loss is at most log(1 + 2 e^4).
    assert 0 < result.evaluation.policies[0].loss[0]["mean"] < 4.7


def test_inner_steps_at_test_and_episodes_with_nothing_to_adapt_to_are_refused(tmp_path):
    config = tiny_run(tmp_path, NearestCentroid())
    with pytest.raises(ConfigError, match="is for algorithms with inner steps, got 2 with NearestCentroid"):
        dataclasses.replace(config, evaluation=EvaluationSettings(inner_steps=2))
    few_shot = dataclasses.replace(config, task=FewShot(pool=config.task.pool, ways=3, shots=1, queries=2))
    with pytest.raises(ConfigError, match=r"NearestCentroid trains on mini-batches .* Use task\.name: pooled_classes"):
        make_experiment(few_shot)
    result = MetaTrainer(config).fit(evaluate=False)
    with pytest.raises(ModelError, match=r"evaluation\.split must be val or test"):
        evaluate(result.run_dir, split="train", num_workers=0)
