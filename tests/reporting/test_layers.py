"""Likeness of representations, and which parts of a model are its layers."""

import numpy as np
import pytest
import torch
from torch import nn

from metadist.core.batch_norm import batch_norms
from metadist.core.network import make_network
from metadist.models import Conv4
from metadist.reporting.adaptation import cka_of
from metadist.reporting.layers import hsic, layers_of, representations
from tests.builders import classification, small_conv4, smooth_mlp


def cka(x, y):
    return cka_of(np.array([[hsic(x, y), hsic(x, x), hsic(y, y)]]))["mean"]


def normal(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def test_cka_is_1_for_what_differs_by_rotation_scale_and_shift_and_not_for_another_linear_map():
    # Kornblith et al. 2019, sec. 2.2 and 2.3: invariant to orthogonal maps and isotropic scaling alone.
    x = normal(9, 5)
    rotation = torch.linalg.qr(normal(5, 5, seed=1))[0]
    assert cka(x, 3 * x @ rotation + normal(5, seed=2)) == pytest.approx(1, abs=1e-12)
    assert cka(x, x * torch.tensor([1.0, 9, 1, 1, 1])) < 0.9


def test_the_unbiased_estimate_is_0_on_average_for_independent_rows_where_the_biased_one_is_near_1():
    # 6 examples, 200 features: centred Gram matrices are nearly multiples of one another whatever the rows are.
    products, biased = [], []
    for seed in range(200):
        x, y = normal(6, 200, seed=2 * seed), normal(6, 200, seed=2 * seed + 1)
        products.append((hsic(x, y), hsic(x, x), hsic(y, y)))
        k, other = ((rows - rows.mean(0)) @ (rows - rows.mean(0)).T for rows in (x, y))
        biased.append(float((k * other).sum() / (k.norm() * other.norm())))
    estimate = cka_of(np.array(products))
    assert abs(estimate["mean"]) < 1.5 * estimate["ci95"] < 0.3
    assert np.mean(biased) > 0.9


def test_the_estimate_is_that_of_its_definition_over_ordered_quadruples():
    # Song et al. 2012, eq. 3: the mean over distinct i, j, q, r of K_ij (L_ij + L_qr - 2 L_iq).
    x, y = normal(6, 3), normal(6, 2, seed=1)
    k, other = x @ x.T, y @ y.T
    indices = range(6)
    terms = [
        float(k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q]))
        for i in indices
        for j in indices
        for q in indices
        for r in indices
        if len({i, j, q, r}) == 4
    ]
    assert hsic(x, y) == pytest.approx(np.mean(terms))


def test_the_interval_of_cka_shrinks_with_the_root_of_the_episodes_and_a_constant_layer_has_no_cka():
    products = []
    for seed in range(400):
        x = normal(6, 3, seed=2 * seed)
        y = x + normal(6, 3, seed=2 * seed + 1)
        products.append((hsic(x, y), hsic(x, x), hsic(y, y)))
    few, many = cka_of(np.array(products[:25])), cka_of(np.array(products))
    assert 2.5 < few["ci95"] / many["ci95"] < 6.5  # sqrt(400 / 25) = 4.
    assert abs(few["mean"] - many["mean"]) < 1.5 * few["ci95"]
    assert cka_of(np.zeros((5, 3))) is None


class Nested(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.net = inner

    def forward(self, x):
        return self.net(x)


def test_layers_are_the_parts_with_parameters_within_the_first_module_that_has_several():
    spec = classification((4,), 3, 2, 4)
    network = make_network(Nested(smooth_mlp(spec)), spec, "transductive")
    layers = layers_of(network)
    assert [(layer.name, layer.label) for layer in layers] == [
        ("net.1", "net.1"),
        ("net.3", "net.3"),
        ("net.5", "net.5"),
    ]
    assert [name for layer in layers for name in layer.parameters] == list(network.parameters.shapes)
    conv = make_network(
        small_conv4(classification((1, 16, 16), 3, 1, 2)), classification((1, 16, 16), 3, 1, 2), "support"
    )
    assert [layer.name for layer in layers_of(conv)] == ["block1", "block2", "block3", "block4", "head"]


@pytest.mark.parametrize("policy", ["transductive", "support"])
def test_representations_are_what_the_modules_of_the_model_give_and_nothing_is_left_behind(policy):
    spec = classification((1, 16, 16), 3, 1, 2)
    module = Conv4(filters=3).build(spec)
    network = make_network(module, spec, policy).bind(torch.zeros(0), training=False)
    params = {name: value.detach() for name, value in module.named_parameters()}
    support, x = normal(3, 1, 16, 16).float(), normal(6, 1, 16, 16, seed=1).float()
    found = representations(network, params, x, layers_of(network), support)
    outputs = network.outputs(params, x, support)
    assert torch.equal(found["head"], outputs)
    # By hand: the first block, with statistics of the set that the policy names.
    convolved = module.block1.conv(x)
    reference = convolved if policy == "transductive" else module.block1.conv(support)
    mean, variance = reference.mean((0, 2, 3), keepdim=True), reference.var((0, 2, 3), unbiased=False, keepdim=True)
    eps = next(iter(batch_norms(module).values())).eps
    expected = nn.functional.max_pool2d(torch.relu((convolved - mean) / torch.sqrt(variance + eps)), 2).flatten(1)
    torch.testing.assert_close(found["block1"], expected.detach(), atol=1e-5, rtol=1e-5)
    assert not any(layer._forward_hooks for skeleton in network.skeletons.values() for layer in skeleton.modules())
