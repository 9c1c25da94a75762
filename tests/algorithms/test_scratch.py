import dataclasses
from hashlib import sha256

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from metadist.algorithms import Scratch
from metadist.core.episode import Examples
from metadist.core.meta_gradient import score_episodes
from metadist.core.outer import OuterSettings
from metadist.errors import ConfigError
from metadist.experiment import make_experiment
from metadist.training import MetaTrainer
from tests.algorithms.contracts import (
    _check_that_all_hyperparameters_vary,
    _check_that_theta_is_untouched,
    curves,
    images,
    points,
)
from tests.algorithms.embedding_based import unequal_ways
from tests.builders import tiny_config


def make(**changes):
    return Scratch(**{"inner_lr": 0.05, "inner_steps": 4, **changes})


VARIATIONS = {
    "inner_lr": 0.01,
    "inner_lr_schedule": ((0, 0.01),),
    "inner_steps": 2,
    "adapts": "*.weight",
    "inner_optimizer": "rmsprop",
    "inner_momentum": 0.5,
    "inner_decay": 0.5,
}


def adapted(problem, batch, task, steps):
    support = Examples(batch.support.x[task], batch.support.y[task])
    network = problem.network.bind(problem.statistics, training=False)
    return problem.algorithm.adapt(network, problem.layout.unflatten(problem.theta), support, steps)


@pytest.mark.parametrize("made", [curves, points, images])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_the_meta_gradient_is_zero_and_the_metrics_are_those_of_adapted_models(made, strategy):
    problem, batch = made(make())
    sums = problem.sums(batch, strategy=strategy)
    assert sums.gradient.dtype == np.float64
    assert np.array_equal(sums.gradient, np.zeros(problem.layout.size))
    scores = score_episodes(
        problem.algorithm,
        problem.network,
        problem.layout,
        problem.theta,
        problem.statistics,
        batch,
        inner_steps=4,
        policies=["transductive"],
        strategy=strategy,
    )
    assert sums.metrics[0] == pytest.approx(scores.loss[0, :, 4].sum(), rel=1e-10)


@pytest.mark.parametrize("made", [curves, points, images])
def test_each_task_is_learned_as_with_torchs_own_adam(made):
    problem, batch = made(make())
    module = problem.module.double().train()
    for task in range(2):
        start = {name: value.clone() for name, value in module.state_dict().items()}
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        x, y = batch.support.x[task], batch.support.y[task]
        for found in adapted(problem, batch, task, 6):
            for name, value in module.named_parameters():
                # Its epsilon of 1e-8 stands beside the root, ours under it: they differ by 0.05 * 1e-8 / |gradient|.
                torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=2e-5)
            optimizer.zero_grad()
            outputs = module(x)
            (F.mse_loss(outputs, y) if y.is_floating_point() else F.cross_entropy(outputs, y)).backward()
            optimizer.step()
        module.load_state_dict(start)


def test_each_hyperparameter_changes_the_adapted_model():
    # The contract looks at meta-gradients, and all of these are zero.
    _check_that_all_hyperparameters_vary(make, VARIATIONS)
    for name, value in VARIATIONS.items():
        phis = []
        for algorithm in (make(), make(**{name: value})):
            problem, batch = points(algorithm)
            phis.append(problem.network.parameters.flatten(adapted(problem, batch, 0, algorithm.inner_steps)[-1]))
        assert not torch.allclose(*phis, rtol=1e-3), f"{name} changes nothing"


@pytest.mark.parametrize("made", [curves, images])
def test_adapting_leaves_theta_untouched(made):
    _check_that_theta_is_untouched(*made(make()))


@pytest.mark.parametrize(
    "change", [{"order": "second"}, {"learn_inner_lr": "per_layer"}, {"checkpoint_inner_steps": True}]
)
def test_settings_of_the_outer_loop_are_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        make(**change)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_run_leaves_theta_as_the_seed_drew_it_to_the_bit(tmp_path, optimizer):
    config = unequal_ways(tmp_path, make())
    task = dataclasses.replace(config.task, train_ways=None, train_shots=None, train_queries=None)
    outer = dataclasses.replace(config.outer, optimizer=optimizer, weight_decay=0.0, lr=0.5, clip_norm=1.0)
    config = dataclasses.replace(config, task=task, outer=outer)
    result = MetaTrainer(config).fit()
    assert result.step == 2
    assert result.theta_sha256 == sha256(make_experiment(config).initial_theta.tobytes()).hexdigest()
    assert result.evaluation.inner_steps == 4


def test_weight_decay_which_would_move_theta_is_refused():
    with pytest.raises(ConfigError, match=r"outer\.weight_decay must be 0 .* got 0\.1\. Leave it out"):
        tiny_config(algorithm=Scratch(), outer=OuterSettings(weight_decay=0.1))


def test_by_default_it_takes_a_hundred_steps_of_adam():
    algorithm = tiny_config(algorithm=Scratch()).algorithm
    assert (algorithm.inner_optimizer, algorithm.inner_steps, algorithm.inner_lr) == ("adam", 100, 0.001)
