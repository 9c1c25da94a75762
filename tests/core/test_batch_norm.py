import copy

import numpy as np
import pytest
import torch
from torch import nn

from metadist.core.episode import Examples
from metadist.core.meta_gradient import Sums
from metadist.core.network import make_network
from metadist.core.outer import OuterSettings
from metadist.core.plan import Plan, Range
from metadist.distributed.learner import Learner
from metadist.experiment import make_experiment
from metadist.models import MLP
from metadist.sections import TrainingSettings
from tests.builders import classification, random_episodes, regression, tiny_config

SUPPORT, QUERY = 6, 9


def shaken(module, seed=0):
    """Random parameters and running statistics, in float64: none of them a neutral value."""
    torch.manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dtype.is_floating_point:
            nn.init.uniform_(tensor, 0.5, 2.0) if "running" in name else nn.init.normal_(tensor)
    return module.double()


def vectors(affine=True):
    # eps is far from its default, so that leaving it out shows.
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.1, affine=affine), nn.Tanh(), nn.Linear(4, 2))
    return shaken(module), regression(3, 2, SUPPORT, QUERY)


def sequences(affine=True):
    module = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3, eps=0.1, affine=affine), nn.Flatten(), nn.Linear(9, 3))
    return shaken(module), classification((2, 5), ways=3, shots=2, queries=3)


def images(affine=True):
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, eps=0.1, affine=affine),
        nn.ReLU(),
        nn.Conv2d(3, 2, 2),
        nn.BatchNorm2d(2, eps=0.2, affine=affine),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return shaken(module), classification((1, 5, 5), ways=3, shots=2, queries=3)


ALL = pytest.mark.parametrize("affine", [True, False])
MODELS = pytest.mark.parametrize("make", [vectors, sequences, images])


def episode(spec, seed=0):
    batch = random_episodes(spec, 1, seed)
    return batch.support.x[0], batch.query.x[0]


def network_of(module, spec, policy):
    # The package trains in float32; a network takes the parameters' own type.
    return make_network(copy.deepcopy(module).float(), spec, policy)


def parameters(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def with_torch(module, x, *, train):
    """The module's own outputs, its buffers spared."""
    return copy.deepcopy(module).train(train)(x).detach()


def input_of_norm(module, x):
    """What reaches the first batch norm: the second layer."""
    return module[0](x).detach()


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@ALL
@MODELS
def test_transductive_is_torchs_batch_norm_in_training_on_each_set(make, affine):
    module, spec = make(affine)
    support, query = episode(spec)
    network = network_of(module, spec, "transductive")
    params = parameters(module)
    assert_close(network.outputs(params, support), with_torch(module, support, train=True))
    assert_close(network.outputs(params, query, reference=support), with_torch(module, query, train=True))


@ALL
@MODELS
def test_transductive_is_the_same_in_evaluation(make, affine):
    module, spec = make(affine)
    support, query = episode(spec)
    network = network_of(module, spec, "transductive").bind(torch.zeros(0), training=False)
    found = network.outputs(parameters(module), query, reference=support)
    assert_close(found, with_torch(module, query, train=True))


@ALL
@pytest.mark.parametrize("make", [vectors, sequences])
def test_support_normalises_a_query_by_the_support_sets_mean_and_variance(make, affine):
    # By hand: (z - mean_s) / sqrt(var_s + eps) * weight + bias with the support's biased variance, per channel.
    module, spec = make(affine)
    support, query = episode(spec)
    network = network_of(module, spec, "support")
    norm, axes = module[1], [0, 2][: support.dim() - 1]
    before = {"support": input_of_norm(module, support), "query": input_of_norm(module, query)}
    shape = [1, -1, 1][: support.dim()]
    mean = before["support"].mean(axes).view(shape)
    variance = ((before["support"] - mean) ** 2).mean(axes).view(shape)
    z = (before["query"] - mean) / torch.sqrt(variance + 0.1)
    if affine:
        z = z * norm.weight.detach().view(shape) + norm.bias.detach().view(shape)
    for layer in list(module)[2:]:
        z = layer(z)
    assert_close(network.outputs(parameters(module), query, reference=support), z.detach())


@ALL
@MODELS
def test_support_predicts_one_query_example_as_it_does_a_whole_set(make, affine):
    module, spec = make(affine)
    support, query = episode(spec)
    network = network_of(module, spec, "support")
    params = parameters(module)
    whole = network.outputs(params, query, reference=support)
    alone = torch.cat([network.outputs(params, query[i : i + 1], reference=support) for i in range(len(query))])
    assert_close(alone, whole)
    # Transductive does not: the test could tell them apart.
    other = network_of(module, spec, "transductive").outputs(params, query, reference=support)
    assert (whole - other).abs().max() > 1e-3


@ALL
@MODELS
def test_support_normalises_the_support_set_by_itself(make, affine):
    module, spec = make(affine)
    support, _ = episode(spec)
    found = network_of(module, spec, "support").outputs(parameters(module), support)
    assert_close(found, with_torch(module, support, train=True))


@ALL
@MODELS
def test_running_trains_by_each_sets_own_statistics(make, affine):
    module, spec = make(affine)
    support, query = episode(spec)
    network = network_of(module, spec, "running")
    params = parameters(module)
    assert_close(network.outputs(params, support), with_torch(module, support, train=True))
    assert_close(network.outputs(params, query, reference=support), with_torch(module, query, train=True))


@ALL
@MODELS
def test_running_records_each_norms_mean_and_unbiased_variance(make, affine):
    # torch's running statistics after one batch with momentum 1 are that batch's mean and unbiased variance.
    module, spec = make(affine)
    _, query = episode(spec)
    network = network_of(module, spec, "running")
    found = network.statistics_layout.unflatten(network.set_statistics([parameters(module)], query))
    reference = copy.deepcopy(module).train()
    for layer in reference:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = 1.0
    reference(query)
    expected = {name: value for name, value in reference.named_buffers() if not name.endswith("tracked")}
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert_close(found[name], value)


@MODELS
def test_per_step_keeps_statistics_of_every_inner_step_and_goes_on_with_the_last(make):
    module, spec = make()
    support, query = episode(spec)
    policy = make_network(copy.deepcopy(module).float(), spec, "per_step", inner_steps=2)
    path = [parameters(shaken(copy.deepcopy(module), seed)) for seed in range(3)]
    flat = policy.set_statistics(path, query)
    running = network_of(module, spec, "running")
    every = [running.set_statistics([params], query) for params in path]
    found = policy.statistics_layout.unflatten(flat)
    for step, expected in enumerate(every):
        for name, value in running.statistics_layout.unflatten(expected).items():
            torch.testing.assert_close(found[name][step], value, rtol=0, atol=0)
    # In evaluation each step has its own, and steps beyond those of training have the last one's.
    for step in range(5):
        bound = policy.bind(flat, training=False).at(step)
        reference = running.bind(every[min(step, 2)], training=False)
        assert_close(bound.outputs(path[0], query, support), reference.outputs(path[0], query, support))
    # While training each set is normalised by its own statistics.
    assert_close(policy.at(1).outputs(path[0], query), running.outputs(path[0], query))


@pytest.mark.parametrize("policy", ["transductive", "support"])
def test_only_running_keeps_statistics(policy):
    module, spec = images()
    network = network_of(module, spec, policy)
    assert network.statistics_layout.size == 0
    assert network.set_statistics([parameters(module)], episode(spec)[1]).shape == (0,)


@ALL
@MODELS
def test_running_evaluates_support_and_query_as_torch_does_with_these_buffers(make, affine):
    module, spec = make(affine)
    support, query = episode(spec)
    network = network_of(module, spec, "running")
    buffers = dict(module.named_buffers())
    statistics = network.statistics_layout.flatten(buffers)
    bound = network.bind(statistics, training=False)
    params = parameters(module)
    assert_close(bound.outputs(params, support), with_torch(module, support, train=False))
    assert_close(bound.outputs(params, query, reference=support), with_torch(module, query, train=False))


def test_running_statistics_start_as_torchs_do():
    module, spec = images()
    network = network_of(module, spec, "running")
    fresh = dict(nn.BatchNorm2d(3).named_buffers()) | {
        f"second.{name}": value for name, value in nn.BatchNorm2d(2).named_buffers()
    }
    expected = [value for name, value in fresh.items() if not name.endswith("tracked")]
    assert network.statistics_layout.flatten(network.statistics).tolist() == torch.cat(expected).tolist()


def learner_with_batch_norm():
    config = tiny_config(
        model=MLP(hidden=(4,), batch_norm=True), training=TrainingSettings(meta_batch_size=1, batch_norm="running")
    )
    return Learner(make_experiment(config), OuterSettings(), 10)


def step_with_statistics(learner, step, statistics, num_tasks):
    theta = learner.state().theta
    sums = Sums(np.zeros_like(theta), statistics.numpy(), np.zeros(2, np.float32))
    learner.step(Plan(0, "train", step, num_tasks, num_tasks), {Range(0, 1): sums})


def test_the_learner_averages_statistics_as_torch_does():
    # One task a step, so the learner and nn.BatchNorm1d see the same sets; torch's default momentum is 0.1.
    learner, reference = learner_with_batch_norm(), nn.BatchNorm1d(4)
    torch.manual_seed(3)
    for step in range(6):
        x = 3 + 2 * torch.randn(7, 4)
        reference.train()(x)
        step_with_statistics(learner, step, torch.cat([x.mean(0), x.var(0, unbiased=True)]), num_tasks=1)
        expected = torch.cat([reference.running_mean, reference.running_var])
        torch.testing.assert_close(torch.from_numpy(learner.state().statistics), expected, rtol=1e-6, atol=1e-6)
    assert (expected[:4] > 1).all()


def test_the_learner_averages_over_the_tasks_of_a_step_first():
    # r <- 0.9 r + 0.1 (sum / tasks), from means 0 and variances 1: here 0.1 * 12 / 3 and 0.9 + 0.1 * 6 / 3.
    learner = learner_with_batch_norm()
    step_with_statistics(learner, 0, torch.tensor([12.0] * 4 + [6.0] * 4), num_tasks=3)
    assert learner.state().statistics.tolist() == pytest.approx([0.4] * 4 + [1.1] * 4, rel=1e-6)


@MODELS
@pytest.mark.parametrize("policy", ["transductive", "support", "running"])
def test_the_users_module_is_never_modified(make, policy):
    module, spec = make()
    module.float()
    before = copy.deepcopy(module.state_dict())
    layers = list(module.modules())
    batch = random_episodes(spec, 1, dtype=torch.float32)
    network = make_network(module, spec, policy)
    params = {name: value + 1 for name, value in parameters(module).items()}
    network.outputs(params, batch.query.x[0], reference=batch.support.x[0])
    network.set_statistics([params], batch.query.x[0])
    assert {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])} == set()
    assert list(module.modules()) == layers
    assert module.training


@MODELS
@pytest.mark.parametrize("policy", ["transductive", "support", "running"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_tasks_is_computed_as_one_task_after_the_other(make, policy, training):
    module, spec = make()
    network = network_of(module, spec, policy)
    size = network.statistics_layout.size
    bound = network.bind(torch.linspace(0.5, 1.5, size, dtype=torch.float64), training=training)
    batch = random_episodes(spec, 3)
    torch.manual_seed(1)
    params = {name: value + torch.randn(3, *value.shape).double() for name, value in parameters(module).items()}

    def outputs(params, support, query):
        return bound.outputs(params, query.x, reference=support.x), bound.set_statistics([params], query.x)

    together = torch.vmap(outputs)(params, batch.support, batch.query)
    for task in range(3):
        alone = outputs(
            {name: value[task] for name, value in params.items()},
            Examples(batch.support.x[task], batch.support.y[task]),
            Examples(batch.query.x[task], batch.query.y[task]),
        )
        assert_close(together[0][task], alone[0])
        assert_close(together[1][task], alone[1])
