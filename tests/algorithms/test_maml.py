import numpy as np
import pytest
import torch
from torch import nn

from metadist.algorithms import MAML
from metadist.core.episode import Examples
from metadist.core.meta_gradient import score_episodes
from metadist.sections import EvaluationSettings
from tests.algorithms.by_hand import adapted_by_hand, conv4_network, loss_of, meta_gradient_by_hand, tanh_network
from tests.algorithms.contracts import GRADIENT_BASED, SAME_BITS, check_algorithm, curves, images, relative_error
from tests.builders import Problem, Quadratic, classification, random_episodes, regression, small_conv4, tiny_config

START, SUPPORT, QUERY = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]], dtype=torch.float64)


def make(**changes):
    return MAML(**{"inner_lr": 0.1, "inner_steps": 3, **changes})


def quadratic(algorithm):
    """One task whose loss is |w - c|^2 / 2 in two dimensions, with other c in support and query."""
    spec = regression(inputs=1, outputs=2, support_size=4, query_size=3)
    batch = random_episodes(spec, 1)
    batch.support.y[:], batch.query.y[:] = SUPPORT, QUERY
    return Problem(algorithm, Quadratic(START.float()), spec), batch


def test_maml_fulfils_the_contract_in_second_order():
    check_algorithm(make, GRADIENT_BASED, same=SAME_BITS)


def test_maml_fulfils_the_contract_in_first_order():
    # FOMAML drops terms of the derivative, so finite differences do not agree with it.
    check_algorithm(
        lambda **changes: make(**{"order": "first", **changes}),
        GRADIENT_BASED | {"order": "second"},
        same=SAME_BITS,
        exact=False,
    )


def test_first_order_is_not_the_derivative_of_the_query_loss():
    # The contract's finite differences could tell: on its problem both orders are far apart.
    problem, batch = curves(make())
    first, _ = curves(make(order="first"))
    assert relative_error(first.sums(batch).gradient, problem.sums(batch).gradient) > 1e-3


@pytest.mark.parametrize(("order", "hessian"), [("second", 0.9**3), ("first", 1.0)])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_meta_gradient_has_closed_form_on_a_quadratic(order, hessian, strategy):
    # L_c(w) = |w - c|^2 / 2, inner_lr 0.1  =>  phi_{k+1} - c_s = 0.9 (phi_k - c_s)
    # =>  phi_3 = c_s + 0.9^3 (theta - c_s),  d phi_3 / d theta = 0.9^3, which first order takes for 1,
    # and the meta-gradient is d phi_3 / d theta times the query loss's own gradient phi_3 - c_q.
    problem, batch = quadratic(make(order=order))
    phi = SUPPORT + 0.9**3 * (START - SUPPORT)
    sums = problem.sums(batch, strategy=strategy)
    np.testing.assert_allclose(sums.gradient, hessian * (phi - QUERY), rtol=1e-12)
    np.testing.assert_allclose(sums.metrics[0], ((phi - QUERY) ** 2).sum() / 2, rtol=1e-12)
    assert np.isnan(sums.metrics[1])


def test_every_inner_step_on_the_way_has_closed_form_on_a_quadratic():
    problem, batch = quadratic(make())
    meta = problem.layout.unflatten(problem.theta)
    path = problem.algorithm.adapt(problem.network, meta, Examples(batch.support.x[0], batch.support.y[0]), 5)
    expected = [SUPPORT + 0.9**step * (START - SUPPORT) for step in range(6)]
    torch.testing.assert_close([phi["w"] for phi in path], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(("make_problem", "network"), [(curves, tanh_network), (images, conv4_network)])
def test_meta_gradient_is_the_one_written_out_with_autograd(make_problem, network, order):
    problem, batch = make_problem(make(order=order))
    expected = meta_gradient_by_hand(network, problem, batch, second_order=order == "second")
    assert relative_error(problem.sums(batch).gradient, expected) < 1e-6


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("make_problem", [curves, images])
def test_without_inner_steps_the_meta_gradient_is_the_plain_gradient(make_problem, order):
    problem, batch = make_problem(make(inner_steps=0, order=order))
    network = tanh_network if make_problem is curves else conv4_network
    theta = [part.clone().requires_grad_() for part in problem.layout.unflatten(problem.theta).values()]
    loss = sum(loss_of(network, theta, Examples(*task)) for task in zip(*batch.query, strict=True))
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, theta)])
    assert relative_error(problem.sums(batch).gradient, expected) < 1e-6


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_at_test_there_may_be_more_inner_steps_than_in_training(strategy):
    problem, batch = curves(make(inner_steps=2))
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
    assert scores.loss.shape == (1, 2, 5)
    for task in range(2):
        support, query = (Examples(part.x[task], part.y[task]) for part in batch)
        for steps in range(5):
            theta = [part.clone().requires_grad_() for part in problem.layout.unflatten(problem.theta).values()]
            phi = adapted_by_hand(tanh_network, theta, support, 0.1, steps, create_graph=False)
            expected = loss_of(tanh_network, phi, query).item()
            assert scores.loss[0, task, steps] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("policies", "times"), [(["transductive", "support"], 1), (["running", "support"], 2)])
def test_the_inner_loop_is_computed_once_for_policies_that_differ_in_the_query_set_alone(monkeypatch, policies, times):
    algorithm = make(inner_steps=2)
    spec = classification((1, 16, 16), ways=3, shots=2, queries=2)
    problem = Problem(algorithm, small_conv4(spec), spec, policy="running")
    calls, adapt = [], MAML.adapt

    def counted(*arguments):
        calls.append(arguments)
        return adapt(*arguments)

    monkeypatch.setattr(MAML, "adapt", counted)
    arguments = (algorithm, problem.network, problem.layout, problem.theta, problem.statistics)
    scores = score_episodes(
        *arguments, random_episodes(spec, 2, seed=2), inner_steps=3, policies=policies, strategy="loop"
    )
    assert len(calls) == 2 * times  # Of two tasks.
    # Each policy still scores with its own statistics.
    assert not np.allclose(scores.loss[0], scores.loss[1], rtol=1e-3)


def test_a_config_says_how_many_inner_steps_there_are_at_test():
    algorithm = make(inner_steps=2)
    assert tiny_config(algorithm=algorithm).inner_steps_at_test == 2
    assert tiny_config(algorithm=algorithm, evaluation=EvaluationSettings(inner_steps=0)).inner_steps_at_test == 0
    assert tiny_config(algorithm=algorithm, evaluation=EvaluationSettings(inner_steps=10)).inner_steps_at_test == 10


@pytest.mark.parametrize(
    ("strategy", "middle", "policy"),
    [("vmap", nn.Tanh(), "transductive"), pytest.param("loop", nn.BatchNorm1d(3), "running", marks=pytest.mark.long)],
)
def test_compiled_equals_eager(strategy, middle, policy):
    # As small as it can be and still be of second order: compiling takes seconds.
    spec = regression(inputs=1, outputs=1, support_size=4, query_size=3)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 3), middle, nn.Linear(3, 1))
    problem = Problem(make(inner_steps=1), module, spec, policy=policy, dtype=torch.float32)
    batch = random_episodes(spec, 3, dtype=torch.float32)
    compiled, eager = (problem.sums(batch, strategy=strategy, compile=compile) for compile in (True, False))
    assert relative_error(compiled.gradient, eager.gradient) < 1e-5
    assert compiled.metrics[0] == pytest.approx(eager.metrics[0], rel=1e-5)
    np.testing.assert_allclose(compiled.statistics, eager.statistics, rtol=1e-5)
    assert compiled.statistics.size == (6 if policy == "running" else 0)
