import pytest
import torch

from metadist.algorithms.meta_sgd import MetaSGD
from tests.algorithms.by_hand import conv4_network, meta_gradient_by_hand, tanh_network
from tests.algorithms.contracts import GRADIENT_BASED, SAME_BITS, check_algorithm, curves, images, relative_error


def make(**changes):
    return MetaSGD(**{"inner_lr": 0.1, "inner_steps": 2, **changes})


def test_meta_sgd_fulfils_the_contract():
    check_algorithm(make, GRADIENT_BASED | {"inner_steps": 3}, same=SAME_BITS)


@pytest.mark.parametrize(("make_problem", "network"), [(curves, tanh_network), (images, conv4_network)])
def test_every_number_has_a_rate_of_its_own_that_the_outer_loop_learns(make_problem, network):
    problem, batch = make_problem(make())
    names = list(problem.network.parameters.shapes)
    assert problem.layout.size == 2 * problem.network.parameters.size
    # Rates that differ and are partly negative, so that a swapped or shared one shows.
    rates = problem.layout.unflatten(problem.theta)
    with torch.no_grad():
        for number, name in enumerate(names):
            rates[f"inner_lr/{name}"] += 0.15 * torch.sin(
                torch.arange(rates[f"inner_lr/{name}"].numel()) + number
            ).view(rates[f"inner_lr/{name}"].shape)
    expected = meta_gradient_by_hand(
        network, problem, batch, rates=lambda meta: lambda step, index: meta[f"inner_lr/{names[index]}"]
    )
    assert relative_error(problem.sums(batch).gradient, expected) < 1e-6
