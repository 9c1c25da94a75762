"""What all gradient-based algorithms share: optimizers, rates, patterns, recomputed steps."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from metadist.algorithms import MAML
from metadist.core.episode import Examples
from metadist.core.meta_gradient import score_episodes
from metadist.errors import ModelError
from tests.algorithms.by_hand import conv4_network, loss_of, meta_gradient_by_hand, tanh_network
from tests.algorithms.contracts import (
    check_derivatives_along_directions,
    check_meta_gradient_by_finite_differences,
    curves,
    images,
    relative_error,
)
from tests.builders import Problem, classification, random_episodes, small_conv4
from tests.memory import peak_bytes

OPTIMIZERS = {
    "sgd": ({}, lambda weights: torch.optim.SGD(weights, lr=0.05)),
    "momentum": ({"inner_momentum": 0.7}, lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.7)),
    "rmsprop": ({"inner_decay": 0.8}, lambda weights: torch.optim.RMSprop(weights, lr=0.05, alpha=0.8, eps=0)),
    "adam": (
        {"inner_momentum": 0.6, "inner_decay": 0.95},
        lambda weights: torch.optim.Adam(weights, lr=0.05, betas=(0.6, 0.95), eps=0),
    ),
}


def make(**changes):
    return MAML(**{"inner_lr": 0.05, "inner_steps": 3, **changes})


DEFAULTS = {
    "momentum": ({}, lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9)),
    "rmsprop": ({}, lambda weights: torch.optim.RMSprop(weights, lr=0.05, eps=0)),
    "adam": ({}, lambda weights: torch.optim.Adam(weights, lr=0.05, eps=0)),
}


@pytest.mark.parametrize(
    ("optimizer", "settings", "reference"),
    [(name, *case) for cases in (OPTIMIZERS, DEFAULTS) for name, case in cases.items()],
)
def test_inner_optimizers_step_as_torchs_do(optimizer, settings, reference):
    problem, batch = curves(make(inner_optimizer=optimizer, **settings))
    support = Examples(batch.support.x[0], batch.support.y[0])
    meta = problem.layout.unflatten(problem.theta)
    path = problem.algorithm.adapt(problem.network, meta, support, 4)
    weights = [value.clone().requires_grad_() for value in meta.values()]
    torchs = reference(weights)
    for number in range(5):
        found = torch.cat([value.flatten() for value in path[number].values()])
        expected = torch.cat([value.detach().flatten() for value in weights])
        # Our 1e-16 under the root is nothing beside these squared gradients.
        assert relative_error(found, expected) < 1e-6
        torchs.zero_grad()
        loss_of(tanh_network, weights, support).backward()
        torchs.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rates", ["no", "shared", "per_layer", "per_layer_per_step", "per_element"])
def test_meta_gradients_through_every_optimizer_and_kind_of_rate_are_exact(optimizer, rates):
    # Away from zero gradients: Adam's first step is their sign, whose derivative is 0 everywhere else.
    settings, _ = OPTIMIZERS[optimizer]
    problem, batch = curves(make(inner_optimizer=optimizer, learn_inner_lr=rates, inner_steps=2, **settings))
    check_meta_gradient_by_finite_differences(problem, batch)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_a_parameter_without_gradient_does_not_make_the_meta_gradient_infinite(optimizer):
    # d sqrt(s) / ds is infinite at s = 0, where a dead unit's squared gradients are.
    problem, batch = images(make(inner_optimizer=optimizer, order="second"))
    theta = problem.layout.unflatten(problem.theta)
    theta["block1.norm.bias"][0] = -100.0  # This channel's ReLU is always off.
    gradient = problem.sums(batch).gradient
    assert torch.isfinite(torch.from_numpy(gradient)).all()


def test_rates_per_layer_and_step_start_equal_and_are_learned_apart():
    problem, batch = curves(make(learn_inner_lr="per_layer_per_step"))
    names = list(problem.network.parameters.shapes)
    meta = problem.layout.unflatten(problem.theta)
    assert all(
        torch.equal(meta[f"inner_lr/{name}"], torch.full((3,), 0.05, dtype=torch.float32).double()) for name in names
    )
    with torch.no_grad():
        for number, name in enumerate(names):
            meta[f"inner_lr/{name}"] += 0.03 * torch.sin(torch.arange(3) + number)
    expected = meta_gradient_by_hand(
        tanh_network, problem, batch, rates=lambda meta: lambda step, index: meta[f"inner_lr/{names[index]}"][step]
    )
    assert relative_error(problem.sums(batch).gradient, expected) < 1e-6


def test_steps_beyond_those_of_training_go_on_with_the_last_steps_rate():
    problem, batch = curves(make(learn_inner_lr="per_layer_per_step", inner_steps=2))
    meta = problem.layout.unflatten(problem.theta)
    for name in problem.network.parameters.shapes:
        meta[f"inner_lr/{name}"][1] = 0.2
    support = Examples(batch.support.x[0], batch.support.y[0])
    path = problem.algorithm.adapt(problem.network, meta, support, 4)
    for before, after in pairwise(path[1:]):
        weights = [before[name].clone().requires_grad_() for name in problem.network.parameters.shapes]
        gradients = torch.autograd.grad(loss_of(tanh_network, weights, support), weights)
        for name, gradient in zip(problem.network.parameters.shapes, gradients, strict=True):
            torch.testing.assert_close(after[name], before[name] - 0.2 * gradient)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("*", ["1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"]),
        ("head", ["5.weight", "5.bias"]),
        ("body", ["1.weight", "1.bias", "3.weight", "3.bias"]),
        ("*.bias", ["1.bias", "3.bias", "5.bias"]),
        (("3.*", "head"), ["3.weight", "3.bias", "5.weight", "5.bias"]),
    ],
)
def test_patterns_say_what_the_inner_loop_changes(patterns, expected):
    problem, batch = curves(make(adapt=patterns))
    assert problem.algorithm.adapted(problem.network) == expected
    meta = problem.layout.unflatten(problem.theta)
    phi = problem.algorithm.adapt(problem.network, meta, Examples(batch.support.x[0], batch.support.y[0]), 1)[-1]
    assert [name for name in meta if not torch.equal(phi[name], meta[name])] == expected


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(ModelError, match=r"algorithm\.adapt: 'haed\.\*' matches no parameter.*1\.weight, 1\.bias"):
        curves(make(adapt="haed.*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_momentum": 0.9}, "inner_momentum is for inner_optimizer: momentum or adam, not sgd"),
        ({"inner_optimizer": "rmsprop", "inner_momentum": 0.9}, "inner_momentum is for"),
        ({"inner_optimizer": "momentum", "inner_decay": 0.9}, "inner_decay is for inner_optimizer: rmsprop or adam"),
        ({"inner_momentum": 1.0, "inner_optimizer": "adam"}, "less than 1"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        make(**settings)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize(
    "settings", [{}, {"inner_optimizer": "adam"}, {"learn_inner_lr": "per_element"}, {"adapt": "body"}]
)
def test_recomputed_inner_steps_give_the_same_bits(strategy, settings):
    for make_problem in (curves, images):
        (plain, batch), (recomputed, _) = (
            make_problem(make(checkpoint_inner_steps=again, **settings)) for again in (False, True)
        )
        found, expected = (problem.sums(batch, strategy=strategy) for problem in (recomputed, plain))
        assert (found.gradient == expected.gradient).all()
        assert found.metrics[0] == expected.metrics[0]


@pytest.mark.parametrize("downsample", ["max_pool", "stride"])
def test_recomputed_inner_steps_need_a_third_of_the_memory(downsample):
    # Ten steps of 5-way 1-shot with 15 queries. What is left: one step's graph, and that of the query set.
    spec = classification((1, 28, 28), ways=5, shots=1, queries=15)
    module = small_conv4(spec, filters=16, downsample=downsample)
    batch = random_episodes(spec, 1, dtype=torch.float32)
    peaks, gradients = {}, {}
    for again in (False, True):
        algorithm = make(inner_steps=10, checkpoint_inner_steps=again)
        problem = Problem(algorithm, module, spec, dtype=torch.float32)
        peaks[again] = peak_bytes(lambda again=again, problem=problem: gradients.update({again: problem.sums(batch)}))
    assert peaks[True] < 0.4 * peaks[False]
    assert (gradients[True].gradient == gradients[False].gradient).all()


def test_recomputed_inner_steps_give_the_derivative_of_the_query_loss():
    check_derivatives_along_directions(*images(make(checkpoint_inner_steps=True)))


def test_the_evaluation_of_recomputed_steps_is_the_plain_one():
    (plain, batch), (recomputed, _) = (images(make(checkpoint_inner_steps=again)) for again in (False, True))
    scores = [
        score_episodes(
            p.algorithm, p.network, p.layout, p.theta, p.statistics, batch,
            inner_steps=4, policies=["transductive", "support"], strategy="vmap",
        )
        for p in (plain, recomputed)
    ]  # fmt: skip
    assert (scores[0].loss == scores[1].loss).all()


def test_conv4_by_hand_is_a_conv4_to_begin_with():
    # The reference that other tests rely on, against the network itself.
    problem, batch = images(make())
    weights = list(problem.layout.unflatten(problem.theta).values())
    found = problem.network.outputs(problem.layout.unflatten(problem.theta), batch.query.x[0])
    torch.testing.assert_close(conv4_network(weights, batch.query.x[0]), found, rtol=1e-8, atol=1e-10)
