import pytest
import torch
from torch import nn

from metadist.algorithms import MAML, MetaCurvature
from metadist.core.episode import Examples
from tests.algorithms.contracts import (
    GRADIENT_BASED,
    SAME_BITS,
    check_algorithm,
    check_derivatives_along_directions,
    check_meta_gradient_by_finite_differences,
    curves,
    images,
    relative_error,
)
from tests.algorithms.test_maml import loss_of, tanh_network
from tests.builders import Problem, classification, random_episodes


def make(**changes):
    return MetaCurvature(**{"inner_lr": 0.1, "inner_steps": 3, **changes})


def shaken(problem):
    """The same problem, each of whose matrices has random numbers added to the identity."""
    random = torch.Generator().manual_seed(7)
    parts = problem.layout.unflatten(problem.theta)
    problem.theta = problem.layout.flatten(
        {
            name: part + 0.3 * torch.randn(part.shape, generator=random, dtype=part.dtype)
            if name.startswith("curvature/")
            else part
            for name, part in parts.items()
        }
    )
    return problem


def kronecker(meta, name):
    """M_o kron M_i kron M_f of one parameter, for its gradient flattened row by row."""
    whole = torch.ones(1, 1, dtype=torch.float64)
    for mode in ("out", "in", "kernel"):
        if f"curvature/{name}/{mode}" in meta:
            whole = torch.kron(whole, meta[f"curvature/{name}/{mode}"])
    return whole


def test_meta_curvature_fulfils_the_contract():
    check_algorithm(make, GRADIENT_BASED, same=SAME_BITS)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("make_problem", [curves, images])
def test_the_first_meta_gradient_of_the_model_is_that_of_maml(make_problem, order):
    # All matrices start as the identity; the model's parameters come first in the flat vector.
    problem, batch = make_problem(make(order=order))
    maml, _ = make_problem(MAML(inner_lr=0.1, inner_steps=3, order=order))
    found, expected = (p.sums(batch).gradient for p in (problem, maml))
    assert len(found) > len(expected)
    assert relative_error(found[: len(expected)], expected) < 1e-12


@pytest.mark.parametrize("make_problem", [curves, images])
def test_the_transformed_gradient_is_a_kronecker_product_times_the_flat_gradient(make_problem):
    problem = shaken(make_problem(make())[0])
    meta = problem.layout.unflatten(problem.theta)
    random = torch.Generator().manual_seed(8)
    gradients = {
        name: torch.randn(shape, generator=random, dtype=torch.float64)
        for name, shape in problem.network.parameters.shapes.items()
    }
    found = problem.algorithm.transformed(meta, gradients)
    for name, gradient in gradients.items():
        expected = (kronecker(meta, name) @ gradient.flatten()).view(gradient.shape)
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)


def test_meta_parameters_are_square_matrices_by_parameter_and_mode():
    # Conv-4 of 3 filters on 16 x 16 images: a kernel of [3, 3, 3, 3] has 9 positions, the head is [3, 3 * 1 * 1].
    shapes = images(make(adapts=("block2.conv.*", "head")))[0].layout.shapes
    assert {name: shape for name, shape in shapes.items() if "curvature" in name} == {
        "curvature/block2.conv.weight/out": (3, 3),
        "curvature/block2.conv.weight/in": (3, 3),
        "curvature/block2.conv.weight/kernel": (9, 9),
        "curvature/block2.conv.bias/out": (3, 3),
        "curvature/head.weight/out": (3, 3),
        "curvature/head.weight/in": (3, 3),
        "curvature/head.bias/out": (3, 3),
    }


def test_meta_gradient_is_the_one_written_out_with_autograd():
    problem, batch = curves(make())
    shaken(problem)
    total = torch.zeros_like(problem.theta)
    for support_x, support_y, query_x, query_y in zip(*batch.support, *batch.query, strict=True):
        parts = problem.layout.unflatten(problem.theta)
        meta = {name: part.clone().requires_grad_() for name, part in parts.items()}
        names = list(problem.network.parameters.shapes)
        weights = [meta[name] for name in names]
        for _ in range(3):
            loss = loss_of(tanh_network, weights, Examples(support_x, support_y))
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            weights = [
                weight - 0.1 * (kronecker(meta, name) @ gradient.flatten()).view(weight.shape)
                for name, weight, gradient in zip(names, weights, gradients, strict=True)
            ]
        loss = loss_of(tanh_network, weights, Examples(query_x, query_y))
        total += torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(meta.values()))])
    for strategy in ("loop", "vmap"):
        assert relative_error(problem.sums(batch, strategy=strategy).gradient, total) < 1e-10


def test_away_from_the_identity_finite_differences_agree_too():
    problem, batch = curves(make())
    check_meta_gradient_by_finite_differences(shaken(problem), batch)
    problem, batch = images(make())
    check_derivatives_along_directions(shaken(problem), batch)


@pytest.mark.long
def test_compiled_equals_eager():
    # Every mode that a matrix can have (out, in, kernel), and no layer more: compiling takes seconds.
    spec = classification(input_shape=(2, 3, 3), ways=2, shots=1, queries=1)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    problem = shaken(Problem(make(inner_steps=1), module, spec, dtype=torch.float32))
    batch = random_episodes(spec, 2, dtype=torch.float32)
    compiled, eager = (problem.sums(batch, compile=compile).gradient for compile in (True, False))
    assert relative_error(compiled, eager) < 1e-5
