import dataclasses

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from metadist.algorithms import ALGORITHMS, Transfer
from metadist.core.episode import Examples
from metadist.core.meta_gradient import score_episodes
from metadist.errors import ConfigError, ModelError
from metadist.evaluation import evaluate
from metadist.experiment import make_experiment
from metadist.models import MLP
from metadist.sections import EvaluationSettings
from metadist.tasks import FewShot, Sinusoid
from metadist.training import MetaTrainer
from tests.algorithms.contracts import check_algorithm, check_derivatives_along_directions
from tests.algorithms.pooled import (
    AtTest,
    check_training_is_that_of_a_plain_classifier,
    tiny_run,
    training_images,
    training_points,
)


def make(**changes):
    return Transfer(**{"inner_lr": 0.3, "inner_steps": 4, **changes})


def fine_tuned_by_hand(at_test, task, steps):
    """(loss, outputs) on the query set after 0, 1, .. steps of torch's own SGD on plain modules."""
    algorithm = at_test.algorithm
    support, query = (Examples(part.x[task], part.y[task]) for part in at_test.batch)
    body, head = at_test.module.train(), nn.Linear(5, 3).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    start = {name: value.clone() for name, value in body.state_dict().items()}
    moving = [*head.parameters(), *(body.parameters() if algorithm.fine_tune_body else [])]
    optimizer = torch.optim.SGD(moving, lr=algorithm.inner_lr)
    found = []
    for step in range(steps + 1):
        with torch.no_grad():
            outputs = head(body(query.x))
        found.append((F.cross_entropy(outputs, query.y), outputs))
        if step < steps:
            optimizer.zero_grad()
            F.cross_entropy(head(body(support.x)), support.y).backward()
            optimizer.step()
    body.load_state_dict(start)
    return found


def test_transfer_fulfils_the_contract():
    # All its hyperparameters are for the test alone, so that training has the same bits with any of them.
    same = {"inner_lr": 0.1, "inner_steps": 2, "fine_tune_body": True}
    check_algorithm(make, {}, same=same, problems=(training_points,))
    check_algorithm(make, {}, same=same, problems=(training_images,), exact=False)
    check_derivatives_along_directions(*training_images(make()))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_training_is_that_of_a_plain_classifier(label_smoothing):
    check_training_is_that_of_a_plain_classifier(make(), label_smoothing)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_fine_tuning_is_torchs_own_gradient_descent(images, body, strategy):
    at_test = AtTest(make(fine_tune_body=body), images=images)
    scores = score_episodes(
        at_test.algorithm,
        at_test.trained,
        at_test.layout,
        at_test.theta,
        at_test.statistics,
        at_test.batch,
        inner_steps=6,
        policies=["transductive"],
        strategy=strategy,
    )
    assert scores.loss.shape == (1, 2, 7)
    for task in range(2):
        support, query = (Examples(part.x[task], part.y[task]) for part in at_test.batch)
        path = at_test.algorithm.adapt(at_test.network, at_test.meta, support, 6)
        for step, (loss, outputs) in enumerate(fine_tuned_by_hand(at_test, task, 6)):
            assert scores.loss[0, task, step] == pytest.approx(float(loss), rel=1e-9)
            found = at_test.algorithm.predict(at_test.network, path[step], support, query.x)
            torch.testing.assert_close(found, outputs, rtol=1e-8, atol=1e-10)


def test_before_the_first_step_all_ways_are_equally_likely():
    at_test = AtTest(make())
    support, query = (Examples(part.x[0], part.y[0]) for part in at_test.batch)
    (phi,) = at_test.algorithm.adapt(at_test.network, at_test.meta, support, 0)
    outputs = at_test.algorithm.predict(at_test.network, phi, support, query.x)
    assert torch.equal(outputs, torch.zeros(6, 3, dtype=torch.float64))


@pytest.mark.parametrize("change", [{"inner_lr": 0.1}, {"inner_steps": 2}, {"fine_tune_body": True}])
def test_each_hyperparameter_changes_the_adapted_model(change):
    outputs = []
    for algorithm in (make(), make(**change)):
        at_test = AtTest(algorithm)
        support, query = (Examples(part.x[0], part.y[0]) for part in at_test.batch)
        phi = algorithm.adapt(at_test.network, at_test.meta, support, algorithm.inner_steps)[-1]
        outputs.append(algorithm.predict(at_test.network, phi, support, query.x))
    assert not torch.allclose(*outputs, rtol=1e-3)


def test_the_embedding_stays_as_it_is_unless_the_body_is_fine_tuned():
    for body in (False, True):
        at_test = AtTest(make(fine_tune_body=body))
        support = Examples(at_test.batch.support.x[0], at_test.batch.support.y[0])
        before = {name: value.clone() for name, value in at_test.meta.items()}
        phi = at_test.algorithm.adapt(at_test.network, at_test.meta, support, 3)[-1]
        moved = [name for name in before if not torch.equal(phi[name], before[name])]
        assert moved == (list(dict(at_test.module.named_parameters())) if body else [])
        assert all(torch.equal(at_test.meta[name], before[name]) for name in before), "theta was changed in place"


def test_under_the_policy_support_queries_do_not_see_each_other():
    at_test = AtTest(make(), images=True, policy="support")
    support, query = (Examples(part.x[0], part.y[0]) for part in at_test.batch)
    phi = at_test.algorithm.adapt(at_test.network, at_test.meta, support, 3)[-1]
    together = at_test.algorithm.predict(at_test.network, phi, support, query.x)
    alone = at_test.algorithm.predict(at_test.network, phi, support, query.x[:1])
    torch.testing.assert_close(alone, together[:1], rtol=1e-9, atol=1e-12)


def test_the_training_head_starts_as_a_linear_layer_from_the_models_own_start():
    # 42 numbers of U(-b, b) with b = 1 / sqrt(5 features), whose standard deviation is b / sqrt(3).
    first, same = (AtTest(make()).meta for _ in range(2))
    other = AtTest(make(), images=True).meta
    weight, bias = first["pooled_head.weight"], first["pooled_head.bias"]
    assert (tuple(weight.shape), tuple(bias.shape)) == ((7, 5), (7,))
    values = torch.cat([weight.flatten(), bias])
    bound = 5**-0.5
    assert 0.9 * bound < values.abs().max() <= bound
    assert abs(values.std() - bound / 3**0.5) < 0.25 * bound
    assert torch.equal(weight, same["pooled_head.weight"])
    assert not torch.equal(weight, other["pooled_head.weight"])


def test_the_training_head_depends_on_the_seed_alone(tmp_path):
    config = tiny_run(tmp_path, make())
    first, again = (make_experiment(config).initial_theta for _ in range(2))
    seeded = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=1))
    experiment = make_experiment(seeded)
    head = slice(-experiment.theta.shapes["pooled_head.bias"][0], None)
    assert (first == again).all()
    assert not (first[head] == experiment.initial_theta[head]).any()


@pytest.mark.parametrize(("rotate", "classes"), [(False, 6), (True, 24)])
def test_the_training_head_has_one_output_a_training_class(tmp_path, rotate, classes):
    shapes = make_experiment(tiny_run(tmp_path, make(), rotate_classes=rotate)).theta.shapes
    assert (shapes["pooled_head.weight"], shapes["pooled_head.bias"]) == ((classes, 4), (classes,))


def test_tasks_that_it_cannot_train_on_are_refused(tmp_path):
    config = tiny_run(tmp_path, make())
    few_shot = dataclasses.replace(config, task=FewShot(pool=config.task.pool, ways=3, shots=1, queries=2))
    with pytest.raises(ConfigError, match=r"Transfer trains on mini-batches .* Use task\.name: pooled_classes"):
        make_experiment(few_shot)
    curves = dataclasses.replace(config, task=Sinusoid(), model=MLP(hidden=(4,)))
    with pytest.raises(ConfigError, match=r"Transfer trains on mini-batches"):
        make_experiment(curves)


@pytest.mark.parametrize("name", ["maml", "proto_net", "scratch"])
def test_an_algorithm_that_adapts_in_training_is_refused_on_mini_batches(tmp_path, name):
    config = dataclasses.replace(tiny_run(tmp_path, make()), algorithm=ALGORITHMS[name]())
    with pytest.raises(ConfigError, match=r"adapts to training episodes.* Use task\.name: few_shot"):
        make_experiment(config)


def test_per_step_batch_norm_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"batch_norm: per_step needs inner steps in training.* Use running"):
        make_experiment(tiny_run(tmp_path, make(), "per_step"))


@pytest.mark.parametrize("change", [{"inner_lr": 0.0}, {"inner_steps": -1}, {"order": "first"}])
def test_settings_without_sense_are_refused(change):
    with pytest.raises(ValidationError):
        make(**change)


@pytest.mark.parametrize("policy", ["running", "support", "transductive"])
def test_a_run_trains_and_is_evaluated_after_each_step(tmp_path, policy):
    config = tiny_run(tmp_path, make(), policy)
    result = MetaTrainer(config).fit()
    assert result.step == 3
    assert 0 <= result.train["accuracy"] <= 1
    assert result.evaluation.inner_steps == 4
    policies = result.evaluation.policies
    assert [scores.batch_norm for scores in policies] == list(dict.fromkeys([policy, "support"]))
    # From a head of zeros, every loss is log 3.
    assert policies[0].loss[0]["mean"] == pytest.approx(1.0986, abs=1e-3)
    fewer = dataclasses.replace(config, evaluation=EvaluationSettings(episodes=5, inner_steps=2))
    assert evaluate(result.run_dir, config=fewer, num_workers=0).inner_steps == 2


def test_scoring_on_training_mini_batches_is_refused(tmp_path):
    result = MetaTrainer(tiny_run(tmp_path, make())).fit(evaluate=False)
    with pytest.raises(ModelError, match=r"evaluation\.split must be val or test with task\.name: pooled_classes"):
        evaluate(result.run_dir, split="train", num_workers=0)
