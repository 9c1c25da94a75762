import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from metadist.algorithms import MAML
from metadist.core.episode import Examples
from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import MetaGradient
from metadist.core.network import make_network
from metadist.errors import ModelError
from metadist.models import MLP, Conv4
from tests.builders import Problem, classification, random_episodes, regression

OMNIGLOT = classification((1, 28, 28), ways=5, shots=1, queries=1)
CURVES = regression(inputs=3, outputs=2, support_size=4, query_size=5)


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def parameters(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def outputs_and_reference(module, spec):
    """The network's outputs on one support set, and the module's own."""
    x = random_episodes(spec, 1, dtype=torch.float32).support.x[0]
    network = make_network(module, spec, "transductive")
    return network.outputs(parameters(module), x), module(x).detach()


@pytest.mark.parametrize(
    ("settings", "shape", "positions"),
    [
        # Four times halved, rounding down: 28 -> 14 -> 7 -> 3 -> 1.
        ({"downsample": "max_pool"}, (1, 28, 28), 1),
        ({"downsample": "max_pool"}, (3, 84, 84), 5 * 5),
        ({"downsample": "max_pool"}, (3, 16, 50), 1 * 3),
        # Four times halved, rounding up: 28 -> 14 -> 7 -> 4 -> 2.
        ({"downsample": "stride"}, (1, 28, 28), 2 * 2),
        ({"downsample": "stride"}, (3, 84, 84), 6 * 6),
        ({"downsample": "stride"}, (2, 1, 17), 1 * 2),
        ({"downsample": "stride", "head": "mean"}, (1, 28, 28), 1),
        ({"downsample": "max_pool", "head": "mean"}, (3, 84, 84), 1),
    ],
)
def test_conv4_gives_a_logit_a_way_for_images_of_any_size(settings, shape, positions):
    spec = classification(shape, ways=4, shots=1, queries=2)
    module = Conv4(filters=8, **settings).build(spec)
    assert module(torch.randn(3, *shape)).shape == (3, 4)
    assert module.head.in_features == 8 * positions


def test_the_standard_conv4_has_the_number_of_parameters_of_its_closed_form():
    # A block: 3 * 3 * in * 64 weights + 64 biases, 64 scales + 64 shifts. The head: 64 positions * 5 + 5.
    first, others = 9 * 1 * 64 + 3 * 64, 9 * 64 * 64 + 3 * 64
    assert first + 3 * others + 64 * 5 + 5 == 112_261
    assert num_parameters(Conv4(filters=64, downsample="max_pool").build(OMNIGLOT)) == 112_261


def test_conv4_with_stride_keeps_positions_only_when_flattened():
    # 2 * 2 positions remain: 64 * 4 * 5 weights in the head in place of 64 * 5.
    assert num_parameters(Conv4(downsample="stride").build(OMNIGLOT)) == 112_261 + 3 * 64 * 5
    assert num_parameters(Conv4(downsample="stride", head="mean").build(OMNIGLOT)) == 112_261


def test_the_mean_head_averages_over_positions():
    module = Conv4(filters=3, downsample="stride", head="mean").build(OMNIGLOT)
    maps = torch.randn(2, 3, 4, 5)
    expected = torch.stack([torch.stack([channel.mean() for channel in image]) for image in maps])
    torch.testing.assert_close(module.pool(maps), expected)


def test_max_pool_comes_after_relu_and_stride_needs_none():
    pooled, strided = (Conv4(downsample=downsample).build(OMNIGLOT) for downsample in ("max_pool", "stride"))
    assert [type(layer) for layer in pooled.block1] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert [type(layer) for layer in strided.block1] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert (pooled.block1.conv.stride, strided.block1.conv.stride) == ((1, 1), (2, 2))


def test_conv4_starts_from_torchs_own_weights():
    # The same seed and the same layers in the same order draw the same numbers.
    torch.manual_seed(0)
    module = Conv4(filters=4).build(OMNIGLOT)
    torch.manual_seed(0)
    for block, channels in ((module.block1, 1), (module.block2, 4), (module.block3, 4), (module.block4, 4)):
        assert torch.equal(block.conv.weight, nn.Conv2d(channels, 4, 3).weight)
    assert torch.equal(module.head.weight, nn.Linear(4, 5).weight)


@pytest.mark.parametrize(("shape", "block"), [((1, 15, 28), 4), ((3, 28, 7), 3), ((1, 1, 1), 1)])
def test_images_that_pooling_halves_to_nothing_are_refused(shape, block):
    spec = classification(shape, ways=2, shots=1, queries=1)
    with pytest.raises(ModelError, match=rf"halves images of .* to nothing in block {block} of 4\. Use larger images"):
        Conv4(downsample="max_pool").build(spec)
    assert Conv4(downsample="stride").build(spec)(torch.zeros(2, *shape)).shape == (2, 2)


def test_conv4_refuses_vectors():
    with pytest.raises(ModelError, match=r"conv4 needs images .* the shape \[3\]\. Use model\.name: mlp"):
        Conv4().build(CURVES)


def test_mlp_is_linear_layers_with_relu_between():
    # 3 * 7 + 7 + 7 * 5 + 5 + 5 * 2 + 2
    module = MLP(hidden=(7, 5)).build(CURVES)
    assert num_parameters(module) == 80
    x = torch.randn(6, 3)
    first, second, last = (layer for layer in module if isinstance(layer, nn.Linear))
    torch.testing.assert_close(module(x), last(second(first(x).relu()).relu()))


def test_mlp_puts_batch_norm_before_each_relu():
    module = MLP(hidden=(7, 5), batch_norm=True).build(CURVES)
    kinds = [type(layer) for layer in module]
    assert kinds == [nn.Flatten, *[nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2, nn.Linear]


def test_mlp_without_hidden_layers_is_linear_and_takes_images():
    # 28 * 28 * 5 weights and 5 biases.
    module = MLP(hidden=()).build(OMNIGLOT)
    assert num_parameters(module) == 28 * 28 * 5 + 5
    assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 5)


@pytest.mark.parametrize(
    "make", [lambda: MLP(hidden=(0,)), lambda: Conv4(filters=0), lambda: Conv4(downsample="average")]
)
def test_settings_that_make_no_network_are_refused(make):
    with pytest.raises(ValidationError):
        make()


class OwnModule(nn.Module):
    """Batch norm, a constant buffer, one that is not saved, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.tensor([1.0, -2.0, 0.5]))
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.again = nn.Linear(3, 3)
        self.again.weight = self.inner[0].weight
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.again(self.inner(x * self.scale + self.offset)))


def test_a_users_module_with_batch_norm_buffers_and_shared_weights_is_computed_as_it_computes_itself():
    found, expected = outputs_and_reference(OwnModule(), CURVES)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_shared_weight_is_one_parameter_that_adapts_everywhere():
    module = OwnModule()
    assert "again.weight" not in parameters(module)
    network = make_network(module, CURVES, "transductive")
    x = random_episodes(CURVES, 1, dtype=torch.float32).support.x[0]
    other = {name: value + 0.5 for name, value in parameters(module).items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5
    torch.testing.assert_close(network.outputs(other, x), module(x).detach(), rtol=1e-5, atol=1e-5)


def test_constant_buffers_are_no_parameters_and_hold_what_they_held_at_the_start():
    module = OwnModule()
    network = make_network(module, CURVES, "transductive")
    assert set(network.constants) == {"offset", "scale"}
    module.offset += 100
    assert network.constants["offset"].tolist() == [1.0, -2.0, 0.5]
    # Where the learner's vector lies, there they are needed: on a GPU, or here on torch's meta device.
    moved = network.bind(torch.zeros(0, device="meta"), training=True)
    assert moved.constants["offset"].device.type == "meta"


def with_dropout():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_dropout_draws_while_training_follows_from_the_chunks_first_key(strategy, compile):
    problem = Problem(MAML(inner_lr=0.1), with_dropout(), CURVES, dtype=torch.float32)
    batch = random_episodes(CURVES, 3, dtype=torch.float32)
    compute = MetaGradient(problem.algorithm, problem.network, problem.layout, strategy=strategy, compile=compile)

    def gradient(step):
        keys = [TaskKey(0, "train", step, task) for task in range(3)]
        return compute.sum_chunk(problem.theta, problem.statistics, batch, np.ones(3, np.float32), keys).gradient

    first, state = gradient(0), torch.get_rng_state()
    other = gradient(1)
    assert np.array_equal(gradient(0), first)
    assert not np.allclose(other, first)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator was moved"


@pytest.mark.parametrize(
    "module",
    [
        with_dropout(),
        nn.Sequential(nn.Linear(3, 2), nn.RReLU()),
        nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (4, 1, 1)), nn.Dropout2d(), nn.Flatten(), nn.Linear(4, 2)),
    ],
)
def test_layers_that_draw_random_numbers_do_so_only_while_training(module):
    network = make_network(module, CURVES, "transductive")
    assert network.is_random
    params, x = parameters(module), random_episodes(CURVES, 1, dtype=torch.float32).support.x[0]
    assert not torch.equal(network.outputs(params, x), network.outputs(params, x))
    evaluated = network.bind(torch.zeros(0), training=False)
    torch.testing.assert_close(evaluated.outputs(params, x), copy.deepcopy(module).eval()(x).detach())
    # In evaluation under the policy `support` as well, whose skeleton is another.
    supported = network.bind(torch.zeros(0), training=False, policy="support")
    torch.testing.assert_close(supported.outputs(params, x, reference=x), copy.deepcopy(module).eval()(x).detach())


def test_a_layer_that_is_random_in_evaluation_too_is_refused_by_name():
    pool = nn.FractionalMaxPool2d(2, output_size=2)
    module = nn.Sequential(nn.Sequential(nn.ReLU(), pool), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(ModelError, match=r"layer '0\.1' \(FractionalMaxPool2d\) draws random numbers even in"):
        make_network(module, OMNIGLOT, "transductive")


@pytest.mark.parametrize("model", [MLP(hidden=(7, 6)), MLP(hidden=(7,), batch_norm=True), Conv4(filters=4)])
def test_the_embedding_is_the_model_without_its_last_layer(model):
    torch.manual_seed(0)
    body = model.embed(OMNIGLOT)
    torch.manual_seed(0)
    whole = model.build(OMNIGLOT)
    x = random_episodes(OMNIGLOT, 1, dtype=torch.float32).support.x[0]
    network = make_network(body, OMNIGLOT, "transductive", embedding=True)
    features = network.outputs(parameters(body), x)
    assert features.shape == (5, network.output_size)
    torch.testing.assert_close(whole[-1](features), whole(x))


def test_dropout_of_nothing_passes():
    found, expected = outputs_and_reference(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.0)), CURVES)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("module", "spec", "message"),
    [
        (nn.Linear(3, 1), CURVES, r"must map \[4, 3\] to \[4, 2\] \(one output a target dimension\), got \[4, 1\]"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 20)),
            OMNIGLOT,
            r"must map \[5, 1, 28, 28\] to \[5, 5\] \(one logit a way\), got \[5, 20\]\. Change its last layer",
        ),
        (nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), CURVES, r"to \[4, 2\] .* got \[8\]"),
        (nn.LSTM(3, 2), CURVES, r"to \[4, 2\] .* got \['tuple'\]"),
    ],
)
def test_a_module_with_other_outputs_than_the_task_needs_is_refused(module, spec, message):
    with pytest.raises(ModelError, match=message):
        make_network(module, spec, "transductive")


@pytest.mark.parametrize(
    ("module", "spec"), [(nn.Linear(4, 2), CURVES), (nn.Embedding(3, 2), CURVES), (nn.Conv2d(3, 5, 3), OMNIGLOT)]
)
def test_a_module_that_cannot_take_the_tasks_inputs_is_refused(module, spec):
    with pytest.raises(ModelError, match=rf"model {type(module).__name__} cannot take inputs of shape"):
        make_network(module, spec, "transductive")


@pytest.mark.parametrize(
    ("layer", "buffer"),
    [
        (nn.InstanceNorm2d(1, track_running_stats=True), "1.running_mean"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 1, 1)), "1.parametrizations.weight.0._u"),
    ],
)
def test_layers_that_keep_a_state_of_their_own_are_refused_by_their_buffer(layer, buffer):
    module = nn.Sequential(nn.Conv2d(1, 1, 1), layer, nn.Flatten(), nn.Linear(784, 5))
    with pytest.raises(ModelError, match=rf"buffer '{buffer}' is written to when the model is called"):
        make_network(module, OMNIGLOT, "transductive")


@pytest.mark.parametrize(("support_size", "query_size"), [(1, 5), (5, 1)])
def test_batch_norm_over_a_single_example_is_refused(support_size, query_size):
    # The variance of one number says nothing; torch's own batch norm refuses it too.
    spec = regression(inputs=3, outputs=2, support_size=support_size, query_size=query_size)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    with pytest.raises(ModelError, match=r"shape \[1, 3\] .* more than 1 value per channel"):
        make_network(module, spec, "transductive")


def test_support_statistics_serve_a_single_query_example():
    spec = regression(inputs=3, outputs=2, support_size=5, query_size=1)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network = make_network(module, spec, "support")
    batch = random_episodes(spec, 1, dtype=torch.float32)
    assert network.outputs(parameters(module), batch.query.x[0], batch.support.x[0]).shape == (1, 2)


def test_losses_are_mean_cross_entropy_and_mean_squared_error():
    # -log softmax at the target: log(e^1 + e^0) - 1 and log(1 + 1) - 0; squares 1, 4, 0, 9 over 4 values.
    few_shot = make_network(nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), OMNIGLOT, "transductive")
    logits, labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    expected = (torch.log(torch.tensor(1.0).exp() + 1) - 1 + torch.log(torch.tensor(2.0))) / 2
    torch.testing.assert_close(few_shot.loss_of(logits, labels), expected)
    assert few_shot.accuracy_of(logits, labels) == 0.5  # A tie goes to the first of the largest logits.

    curves = make_network(nn.Linear(3, 2), CURVES, "transductive")
    assert curves.loss_of(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])) == 14 / 4
    assert curves.accuracy_of(torch.zeros(2, 2), torch.zeros(2, 2)).isnan()


def test_the_loss_of_examples_is_that_of_their_outputs():
    module = nn.Linear(3, 2)
    network = make_network(module, CURVES, "transductive")
    batch = random_episodes(CURVES, 1, dtype=torch.float32)
    examples = Examples(batch.query.x[0], batch.query.y[0])
    expected = ((module(examples.x) - examples.y) ** 2).mean().detach()
    torch.testing.assert_close(network.loss(parameters(module), examples), expected)


def test_parameters_with_requires_grad_false_stay_as_they_are():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    for value in module[0].parameters():
        value.requires_grad_(False)
    spec = regression(inputs=1, outputs=1, support_size=4, query_size=3)
    network = make_network(module, spec, "transductive")
    assert list(network.parameters.shapes) == ["2.weight", "2.bias"]
    x = torch.randn(4, 1)
    trained = {name: value.detach() for name, value in module[2].named_parameters(prefix="2")}
    torch.testing.assert_close(network.outputs(trained, x), module(x))
    with pytest.raises(ModelError, match="no parameter with requires_grad=True"):
        make_network(module.requires_grad_(False), spec, "transductive")
