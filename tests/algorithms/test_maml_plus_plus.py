import numpy as np
import pytest
import torch
from pydantic import ValidationError

from metadist.algorithms.maml_plus_plus import LOSS_WEIGHTS, MAMLPlusPlus
from metadist.core.episode import Examples
from metadist.core.meta_gradient import score_episodes
from tests.algorithms.by_hand import conv4_network, loss_of, meta_gradient_by_hand, path_by_hand, tanh_network
from tests.algorithms.contracts import (
    GRADIENT_BASED,
    SAME_BITS,
    Beside,
    check_algorithm,
    curves,
    images,
    relative_error,
)
from tests.builders import Problem


def make(**changes):
    return MAMLPlusPlus(**{"inner_lr": 0.1, "inner_steps": 3, "multi_step_loss_steps": 100, **changes})


def test_maml_plus_plus_fulfils_the_contract():
    variations = {
        "learn_inner_lr": "no",
        "multi_step_loss": False,
        # At step 0 all inner steps weigh the same, however long that is annealed.
        "multi_step_loss_steps": Beside(60, step=50),
        "second_order_from": 1,
        "per_step_batch_norm": False,
    }
    # A parameter that several losses and steps use has its derivatives added in another order when they are
    # computed again.
    check_algorithm(make, GRADIENT_BASED | variations, same=SAME_BITS, same_to=1e-14)


@pytest.mark.parametrize(
    ("step", "weights"),
    [
        # Shares of 1/3 each move to the last: after a quarter of the way the first two have 1/3 * 3/4.
        (0, [1 / 3, 1 / 3, 1 / 3]),
        (25, [0.25, 0.25, 0.5]),
        # No less than 0.03 of the first share while they move.
        (99, [0.01, 0.01, 0.98]),
        (100, [0, 0, 1]),
    ],
)
def test_the_losses_of_the_inner_steps_are_weighed_as_far_as_training_has_come(step, weights):
    problem, batch = curves(make())
    names = list(problem.network.parameters.shapes)
    expected = meta_gradient_by_hand(
        tanh_network,
        problem,
        batch,
        rates=lambda meta: lambda step, index: meta[f"inner_lr/{names[index]}"][step],
        loss_weights=weights,
    )
    found = problem.sums(batch, step=step)
    assert relative_error(found.gradient, expected) < 1e-6
    # What is reported is always the loss after the last step.
    assert found.metrics[0] == pytest.approx(problem.sums(batch, step=100).metrics[0], rel=1e-12)


def test_the_order_of_the_derivative_changes_at_its_step():
    # The rates' own derivative does not pass through a Hessian, so both orders have it.
    problem, batch = curves(make(second_order_from=7, multi_step_loss=False))
    for step, second_order in ((6, False), (7, True)):
        fixed, _ = curves(make(order="second" if second_order else "first", multi_step_loss=False))
        expected = fixed.sums(batch)
        assert np.array_equal(problem.sums(batch, step=step).gradient, expected.gradient)
    assert relative_error(problem.sums(batch, step=6).gradient, problem.sums(batch, step=7).gradient) > 1e-3


def test_only_three_different_algorithms_are_ever_compiled():
    algorithm = make(second_order_from=7)
    assert len({algorithm.at_step(step) for step in range(0, 200)}) == 3


def test_every_inner_step_has_batch_norms_of_its_own_that_only_the_outer_loop_learns():
    problem, batch = images(make(multi_step_loss=False, learn_inner_lr="no"))
    meta = problem.layout.unflatten(problem.theta)
    norms = [f"block{number}.norm.{kind}" for number in range(1, 5) for kind in ("weight", "bias")]
    for number, name in enumerate(norms):
        assert meta[f"per_step/{name}"].shape == (4, 3)
        meta[f"per_step/{name}"] += 0.3 * torch.sin(torch.arange(12.0) + number).view(4, 3)
    names = [name for name, _ in problem.module.named_parameters()]
    total = torch.zeros_like(problem.theta)
    for task in range(2):
        support, query = (Examples(part.x[task], part.y[task]) for part in batch)
        leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}

        def with_norms(weights, step, leaves=leaves):
            return [
                leaves[f"per_step/{name}"][step] if name in norms else weight
                for name, weight in zip(names, weights, strict=True)
            ]

        weights = [leaves[name] for name in names]
        for step in range(3):
            current = with_norms(weights, step)
            adapted = [weight for name, weight in zip(names, current, strict=True) if name not in norms]
            gradients = iter(torch.autograd.grad(loss_of(conv4_network, current, support), adapted, create_graph=True))
            weights = [w if n in norms else w - 0.1 * next(gradients) for n, w in zip(names, current, strict=True)]
        loss = loss_of(conv4_network, with_norms(weights, 3), query)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        total += torch.cat([part.flatten() for part in gradients])
    assert relative_error(problem.sums(batch).gradient, total) < 1e-6


def test_at_test_further_steps_go_on_with_the_last_steps_rates_and_batch_norms():
    problem, batch = images(make(multi_step_loss=False, inner_steps=1))
    meta = problem.layout.unflatten(problem.theta)
    meta["per_step/block2.norm.weight"][1] += 0.5
    support = Examples(batch.support.x[0], batch.support.y[0])
    path = problem.algorithm.adapt(problem.network, meta, support, 4)
    for step in (1, 2, 4):
        assert torch.equal(path[step]["block2.norm.weight"], meta["per_step/block2.norm.weight"][1])
    assert not torch.equal(path[4]["head.weight"], path[3]["head.weight"])


def test_running_statistics_per_step_are_those_of_the_parameters_on_the_way():
    problem, batch = images(make(multi_step_loss=False))
    per_step = Problem(problem.algorithm, problem.module, problem.spec, policy="per_step")
    found = per_step.network.statistics_layout.unflatten(torch.from_numpy(per_step.sums(batch).statistics))
    first = problem.module.block1.conv
    meta = problem.layout.unflatten(problem.theta)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for task in range(2):
        support = Examples(batch.support.x[task], batch.support.y[task])
        for step, params in enumerate(problem.algorithm.adapt(problem.network, meta, support, 3)):
            kernel, bias = params["block1.conv.weight"], params["block1.conv.bias"]
            x = torch.nn.functional.conv2d(batch.query.x[task], kernel, bias, padding=first.padding)
            expected[step] += x.mean((0, 2, 3))
    torch.testing.assert_close(found["block1.norm.running_mean"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("policy", ["transductive", "per_step"])
def test_evaluation_needs_nothing_of_training(policy):
    problem, batch = images(make())
    evaluated = Problem(problem.algorithm, problem.module, problem.spec, policy=policy)
    scores = score_episodes(
        evaluated.algorithm, evaluated.network, evaluated.layout, evaluated.theta, evaluated.statistics, batch,
        inner_steps=5, policies=[policy, "support"], strategy="vmap",
    )  # fmt: skip
    assert np.isfinite(scores.loss).all()
    assert LOSS_WEIGHTS not in evaluated.layout.shapes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be >= 1"),
        ({"order": "first", "second_order_from": 5}, "second_order_from is for order: second"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        make(**settings)


def test_path_by_hand_is_used_with_other_losses_than_the_last_too():
    # Guards the reference: with weights (0, 1, 0) it is the gradient of the loss after two steps.
    problem, batch = curves(make(learn_inner_lr="no"))
    total = torch.zeros_like(problem.theta)
    for task in range(2):
        theta = [part.clone().requires_grad_() for part in problem.layout.unflatten(problem.theta).values()]
        support, query = (Examples(part.x[task], part.y[task]) for part in batch)
        phi = path_by_hand(tanh_network, theta, support, lambda step, i: 0.1, 2, create_graph=True)[2]
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(tanh_network, phi, query), theta)])
    found = meta_gradient_by_hand(tanh_network, problem, batch, loss_weights=[0.0, 1.0, 0.0])
    assert relative_error(found, total) < 1e-12
