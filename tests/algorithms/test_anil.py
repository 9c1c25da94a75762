import pytest

from metadist.algorithms.anil import ANIL
from tests.algorithms.by_hand import conv4_network, meta_gradient_by_hand, tanh_network
from tests.algorithms.contracts import GRADIENT_BASED, SAME_BITS, check_algorithm, curves, images, relative_error


def make(**changes):
    return ANIL(**{"inner_lr": 0.1, "inner_steps": 3, **changes})


def test_anil_fulfils_the_contract():
    check_algorithm(make, GRADIENT_BASED, same=SAME_BITS)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(("make_problem", "network"), [(curves, tanh_network), (images, conv4_network)])
def test_the_inner_loop_changes_the_last_layer_alone(make_problem, network, order):
    # MAML by hand with a rate of 0 everywhere but in the last weight and bias.
    problem, batch = make_problem(make(order=order))
    last = len(problem.network.parameters.shapes) - 2
    expected = meta_gradient_by_hand(
        network,
        problem,
        batch,
        second_order=order == "second",
        rates=lambda meta: lambda step, index: 0.1 if index >= last else 0.0,
    )
    assert relative_error(problem.sums(batch).gradient, expected) < 1e-6
