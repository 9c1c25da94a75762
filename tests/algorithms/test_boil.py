import pytest

from metadist.algorithms.boil import BOIL
from tests.algorithms.by_hand import conv4_network, meta_gradient_by_hand, tanh_network
from tests.algorithms.contracts import GRADIENT_BASED, SAME_BITS, check_algorithm, curves, images, relative_error


def make(**changes):
    return BOIL(**{"inner_lr": 0.1, "inner_steps": 3, **changes})


def test_boil_fulfils_the_contract():
    check_algorithm(make, GRADIENT_BASED, same=SAME_BITS)


@pytest.mark.parametrize(("make_problem", "network"), [(curves, tanh_network), (images, conv4_network)])
def test_the_inner_loop_leaves_the_last_layer_as_it_is(make_problem, network):
    # MAML by hand with a rate of 0 in the last weight and bias.
    problem, batch = make_problem(make())
    last = len(problem.network.parameters.shapes) - 2
    expected = meta_gradient_by_hand(
        network, problem, batch, rates=lambda meta: lambda step, index: 0.0 if index >= last else 0.1
    )
    assert relative_error(problem.sums(batch).gradient, expected) < 1e-6
