import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metadist.algorithms.cavia import CAVIA
from metadist.core.episode import Examples
from metadist.errors import ModelError
from tests.algorithms.by_hand import tanh_network
from tests.algorithms.contracts import (
    GRADIENT_BASED,
    SAME_BITS,
    check_algorithm,
    check_derivatives_along_directions,
    relative_error,
)
from tests.algorithms.contracts import curves as contract_curves
from tests.algorithms.contracts import images as contract_images
from tests.builders import Problem, classification, random_episodes, regression, small_conv4, smooth_mlp


def make(**changes):
    return CAVIA(**{"inner_lr": 0.5, "inner_steps": 3, "num_context": 4, "context_layer": "1", **changes})


def test_cavia_fulfils_the_contract():
    variations = {name: value for name, value in GRADIENT_BASED.items() if name != "adapts"}
    variations |= {"num_context": 3, "context_layer": "3"}
    check_algorithm(make, variations, same=SAME_BITS, same_to=1e-14, problems=[contract_curves])
    on_images = variations | {"context_layer": "block2.conv"}
    check_algorithm(
        lambda **changes: make(**{"context_layer": "block3.norm", **changes}),
        on_images,
        same=SAME_BITS,
        same_to=1e-14,
        problems=[contract_images],
    )


def curves(**changes):
    spec = regression(inputs=2, outputs=2, support_size=5, query_size=4)
    return Problem(make(**changes), smooth_mlp(spec), spec), random_episodes(spec, 2, seed=1)


def images(layer):
    spec = classification((1, 16, 16), ways=3, shots=2, queries=2)
    return Problem(make(context_layer=layer), small_conv4(spec), spec), random_episodes(spec, 2, seed=2)


def test_at_a_linear_layer_the_context_is_concatenated_to_its_input():
    # Written out: the first layer's weight is [W, U] and its input [x, c]; the context starts at 0 and alone adapts.
    problem, batch = curves()
    total = torch.zeros_like(problem.theta)
    for task in range(2):
        support, query = (Examples(part.x[task], part.y[task]) for part in batch)
        meta = {name: v.clone().requires_grad_() for name, v in problem.layout.unflatten(problem.theta).items()}

        def outputs(context, x, meta=meta):
            weights = [
                torch.cat([meta["1.layer.weight"], meta["1.film.weight"]], dim=1),
                meta["1.layer.bias"],
                *[meta[name] for name in ("3.weight", "3.bias", "5.weight", "5.bias")],
            ]
            return tanh_network(weights, torch.cat([x, context.expand(len(x), -1)], dim=1))

        context = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        for _ in range(3):
            loss = F.mse_loss(outputs(context, support.x), support.y)
            context = context - 0.5 * torch.autograd.grad(loss, context, create_graph=True)[0]
        loss = F.mse_loss(outputs(context, query.x), query.y)
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(meta.values()))])
    assert relative_error(problem.sums(batch).gradient, total) < 1e-10


def test_elsewhere_the_context_scales_and_shifts_every_channel():
    problem, batch = images("block3.norm")
    meta, x = problem.layout.unflatten(problem.theta), batch.query.x[0]
    assert {name for name in meta if "film" in name} == {"block3.norm.film.weight", "block3.norm.film.bias"}
    context = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    found = problem.network.outputs(meta | {"block3.norm.context": context}, x)
    gamma, beta = (meta["block3.norm.film.weight"] @ context + meta["block3.norm.film.bias"]).chunk(2)
    # A scale and a shift behind batch norm are batch norm's own: gamma (s n + t) + beta.
    folded = dict(meta)
    folded["block3.norm.layer.weight"] = gamma * meta["block3.norm.layer.weight"]
    folded["block3.norm.layer.bias"] = gamma * meta["block3.norm.layer.bias"] + beta
    torch.testing.assert_close(found, problem.network.outputs(folded, x))


def test_without_context_the_model_is_as_it_was():
    spec = classification((1, 16, 16), ways=3, shots=2, queries=2)
    x = random_episodes(spec, 1).query.x[0]
    problem, _ = images("block3.norm")
    found = problem.network.outputs(problem.layout.unflatten(problem.theta), x)
    module = small_conv4(spec).double()
    torch.testing.assert_close(found, module(x).detach())


@pytest.mark.parametrize("layer", ["block3.norm", "block2.conv", "head"])
def test_the_context_may_enter_anywhere(layer):
    problem, batch = images(layer)
    assert not any(name.endswith("context") for name in problem.layout.shapes), "the outer loop learns no context"
    check_derivatives_along_directions(problem, batch)
    support = Examples(batch.support.x[0], batch.support.y[0])
    path = problem.algorithm.adapt(problem.network, problem.layout.unflatten(problem.theta), support, 2)
    changed = [name for name in path[2] if not torch.equal(path[2][name], path[0][name])]
    assert changed == [f"{layer}.context"]
    assert not np.allclose(path[2][f"{layer}.context"], 0)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("block9.norm", r"algorithm\.context_layer: 'block9\.norm' is no layer of the model\. There are: block1, "),
        ("block3.relu", r"'block3\.relu' \(ReLU\) does not say how many channels it gives"),
    ],
)
def test_a_layer_that_cannot_take_the_context_is_refused(layer, message):
    with pytest.raises(ModelError, match=message):
        images(layer)


def test_the_users_module_is_not_changed():
    spec = regression(inputs=2, outputs=2, support_size=5, query_size=4)
    module = smooth_mlp(spec)
    Problem(make(), module, spec)
    assert isinstance(module[1], nn.Linear)
