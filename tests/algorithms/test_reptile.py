import numpy as np
import pytest
import torch
from torch import nn

from metadist.algorithms import Reptile
from metadist.algorithms.reptile import minibatch
from metadist.core.episode import Examples
from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import MetaGradient, score_episodes
from tests.algorithms.by_hand import conv4_network, loss_of, tanh_network
from tests.algorithms.contracts import GRADIENT_BASED, check_algorithm, curves, images, relative_error
from tests.builders import Problem, Quadratic, random_episodes, regression

NOT_HERE = ("order", "learn_inner_lr", "checkpoint_inner_steps")
VARIATIONS = {name: value for name, value in GRADIENT_BASED.items() if name not in NOT_HERE} | {"inner_batch": 2}
ADAM = {"inner_optimizer": "adam", "inner_momentum": 0.0}


def make(**changes):
    return Reptile(**{"inner_lr": 0.1, "inner_steps": 3, **changes})


def leaves_of(problem):
    return [part.clone().requires_grad_() for part in problem.layout.unflatten(problem.theta).values()]


def test_reptile_fulfils_the_contract():
    check_algorithm(make, VARIATIONS, exact=False)


def test_reptile_on_minibatches_fulfils_the_contract():
    varied = VARIATIONS | {"inner_batch": None}
    check_algorithm(lambda **changes: make(**{"inner_batch": 2, **changes}), varied, exact=False)


@pytest.mark.parametrize("name", NOT_HERE)
def test_options_of_a_graph_through_the_inner_loop_are_refused(name):
    with pytest.raises(ValueError, match=name):
        make(**{name: "first"})


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("inner_steps", [0, 1, 4])
def test_meta_gradient_has_closed_form_on_a_quadratic(inner_steps, strategy):
    # L_s(w) = |w - c|^2 / 2, inner_lr 0.1  =>  phi_K = c + 0.9^K (theta - c)  =>  theta - phi_K =
    # (1 - 0.9^K) (theta - c), whatever the query set is.
    start, center = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, -2.0], [0.5, 3.0]))
    spec = regression(inputs=1, outputs=2, support_size=4, query_size=3)
    batch = random_episodes(spec, 1)
    batch.support.y[:] = center
    problem = Problem(make(inner_steps=inner_steps), Quadratic(start.float()), spec)
    expected = (1 - 0.9**inner_steps) * (start - center)
    np.testing.assert_allclose(problem.sums(batch, strategy=strategy).gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("make_problem", "network"), [(curves, tanh_network), (images, conv4_network)])
def test_one_step_on_the_whole_set_gives_the_support_gradient_times_the_rate(make_problem, network):
    problem, batch = make_problem(make(inner_steps=1))
    theta = leaves_of(problem)
    loss = sum(loss_of(network, theta, Examples(*task)) for task in zip(*batch.support, strict=True))
    expected = 0.1 * torch.cat([part.flatten() for part in torch.autograd.grad(loss, theta)])
    assert relative_error(problem.sums(batch).gradient, expected) < 1e-10


@pytest.mark.parametrize("changes", [{}, ADAM, {"inner_optimizer": "adam", "inner_decay": 0.9}])
@pytest.mark.parametrize("step", [0, 2, 7])
def test_minibatch_steps_are_those_of_torchs_own_optimizers(step, changes):
    # Five examples in threes for four steps: 12 places, so pieces reach over the ends of the permutations. At
    # outer step 2 all places are moved on by 2, at outer step 7 by 7 - 5 = 2 as well.
    problem, batch = curves(make(inner_steps=4, inner_batch=3, **changes))
    expected = torch.zeros_like(problem.theta)
    for support in zip(*batch.support, strict=True):
        phi = leaves_of(problem)
        betas = (changes.get("inner_momentum", 0.9), changes.get("inner_decay", 0.999))
        optimizer = torch.optim.Adam(phi, lr=0.1, betas=betas, eps=0) if changes else torch.optim.SGD(phi, lr=0.1)
        for inner_step in range(4):
            places = [(place + step) % 5 for place in minibatch(5, 3, inner_step)]
            optimizer.zero_grad()
            loss_of(tanh_network, phi, Examples(*(part[places] for part in support))).backward()
            optimizer.step()
        expected += problem.theta - torch.cat([part.detach().flatten() for part in phi])
    for strategy in ("loop", "vmap"):
        compute = MetaGradient(problem.algorithm, problem.network, problem.layout, strategy=strategy, compile=False)
        keys = [TaskKey(0, "train", step, task) for task in range(2)]
        sums = compute.sum_chunk(problem.theta, problem.statistics, batch, np.ones(2, np.float32), keys)
        # Ours adds 1e-8 squared under the root, torch's 1e-8 to the root (here 0): of a gradient of 1e-4 that is 5e-9.
        assert relative_error(sums.gradient, expected) < 1e-7


def test_minibatches_are_pieces_of_one_permutation_after_another():
    places = [place for step in range(20) for place in minibatch(7, 3, step)]
    passes = [places[start : start + 7] for start in range(0, 56, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 6, "the passes have one and the same order"
    assert passes[0] != list(range(7))
    # A batch larger than the set has examples more than once: 10 of 5 has each twice.
    assert sorted(minibatch(5, 10, 3)) == sorted([0, 1, 2, 3, 4] * 2)


def test_every_example_stands_in_every_place_once_in_as_many_outer_steps_as_there_are_examples():
    # With |w - c_i|^2 / 2 and minibatches of one, the example seen last weighs most: phi_2 = 0.81 theta + 0.09 a +
    # 0.1 b. Over 4 outer steps each of 4 examples is a once and b once: the gradients add up to
    # 4 * 0.19 theta - 0.19 * sum of c_i; one fixed order would give two examples all the weight.
    spec = regression(inputs=1, outputs=2, support_size=4, query_size=3)
    batch = random_episodes(spec, 1)
    problem = Problem(make(inner_steps=2, inner_batch=1), Quadratic(torch.tensor([1.0, -2.0])), spec)
    compute = MetaGradient(problem.algorithm, problem.network, problem.layout, strategy="loop", compile=False)
    found = [
        compute.sum_chunk(problem.theta, problem.statistics, batch, np.ones(1), [TaskKey(0, "train", step, 0)]).gradient
        for step in range(3, 7)
    ]
    expected = 4 * 0.19 * problem.theta - 0.19 * batch.support.y[0].sum(0)
    np.testing.assert_allclose(sum(found), expected, rtol=1e-10)
    assert relative_error(4 * found[0], expected) > 1e-2


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_the_adapted_model_is_scored_after_minibatch_steps_too(strategy):
    problem, batch = curves(make(inner_batch=2))
    scores = score_episodes(
        problem.algorithm,
        problem.network,
        problem.layout,
        problem.theta,
        problem.statistics,
        batch,
        inner_steps=6,
        policies=["transductive"],
        strategy=strategy,
    )
    for task in range(2):
        support, query = (Examples(part.x[task], part.y[task]) for part in batch)
        phi = leaves_of(problem)
        for step in range(7):
            assert scores.loss[0, task, step] == pytest.approx(loss_of(tanh_network, phi, query).item(), rel=1e-10)
            places = minibatch(5, 2, step)
            loss = loss_of(tanh_network, phi, Examples(support.x[places], support.y[places]))
            with torch.no_grad():
                phi = [p - 0.1 * g for p, g in zip(phi, torch.autograd.grad(loss, phi), strict=True)]
            phi = [part.requires_grad_() for part in phi]


def test_the_outer_optimizer_moves_theta_towards_the_mean_of_phi():
    # sgd with rate epsilon: theta - epsilon * mean(theta - phi) = (1 - epsilon) theta + epsilon * mean(phi).
    problem, batch = curves(make(inner_batch=2))
    meta = problem.layout.unflatten(problem.theta)
    phi = [
        problem.layout.flatten(problem.algorithm.adapt(problem.network, meta, Examples(*support), 3)[-1])
        for support in zip(*batch.support, strict=True)
    ]
    theta = nn.Parameter(problem.theta.clone())
    theta.grad = torch.from_numpy(problem.sums(batch).gradient) / 2
    torch.optim.SGD([theta], lr=0.25).step()
    torch.testing.assert_close(theta.detach(), 0.75 * problem.theta + 0.25 * (phi[0] + phi[1]) / 2)


@pytest.mark.parametrize("strategy", ["loop", pytest.param("vmap", marks=pytest.mark.long)])
def test_compiled_equals_eager(strategy):
    spec = regression(inputs=1, outputs=1, support_size=4, query_size=3)
    torch.manual_seed(0)
    # No batch norm: it makes the bias before it useless, and Adam turns that one's round-off into whole steps.
    module = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    problem = Problem(make(inner_steps=2, inner_batch=3, **ADAM), module, spec, dtype=torch.float32)
    batch = random_episodes(spec, 3, dtype=torch.float32)
    compiled, eager = (problem.sums(batch, strategy=strategy, compile=compile) for compile in (True, False))
    assert relative_error(compiled.gradient, eager.gradient) < 1e-3
    np.testing.assert_allclose(compiled.metrics[0], eager.metrics[0], rtol=1e-4)
