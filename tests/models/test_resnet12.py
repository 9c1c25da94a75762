import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from metadist.algorithms import MAML
from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import MetaGradient
from metadist.core.network import make_network
from metadist.errors import ModelError
from metadist.models import ResNet12
from metadist.models.resnet12 import DropBlock
from tests.algorithms.contracts import check_derivatives_along_directions, relative_error
from tests.builders import Problem, classification, random_episodes, regression

SMALL = {"widths": (3, 4, 5, 6)}
STILL = {"dropout": 0.0, "drop_block_rate": 0.0}
IMAGES = classification((2, 16, 16), ways=3, shots=2, queries=2)


def small_resnet12(**settings):
    torch.manual_seed(0)
    module = ResNet12(**{**SMALL, **settings}).build(IMAGES)
    for name, parameter in module.named_parameters():
        # Unit scales and zero shifts are special values: shaken.
        if parameter.dim() == 1 and not name.startswith("head"):
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
    return module


def normalised(x, scale, shift):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]


def resnet12_by_hand(weights, x, pool):
    """From the weights alone, in the order of the module: three times conv, scale, shift, then the shortcut's."""
    *blocks, last, last_bias = weights
    for block in range(4):
        parts = blocks[12 * block : 12 * block + 12]
        y = x
        for number in range(3):
            kernel, scale, shift = parts[3 * number : 3 * number + 3]
            y = normalised(F.conv2d(y, kernel, padding=1), scale, shift)
            if number < 2:
                y = torch.where(y > 0, y, 0.1 * y)
        kernel, scale, shift = parts[9:]
        # A 1 x 1 convolution is a matrix product over channels.
        y = y + normalised(torch.einsum("nchw,oc->nohw", x, kernel[:, :, 0, 0]), scale, shift)
        x = F.max_pool2d(torch.where(y > 0, y, 0.1 * y), 2)
    features = x.mean((2, 3)) if pool == "mean" else x.reshape(len(x), -1)
    return features @ last.T + last_bias


def test_the_standard_resnet12_has_the_number_of_parameters_of_its_closed_form():
    # A block from i to o channels: convolutions 9 i o + 2 * 9 o o, shortcut i o, four batch norms of 2 o each.
    def block(i, o):
        return 9 * i * o + 18 * o * o + i * o + 8 * o

    # 84 x 84 images end as 5 x 5 positions of 640 channels.
    body = block(3, 64) + block(64, 160) + block(160, 320) + block(320, 640)
    assert body == 12_424_320
    spec = classification((3, 84, 84), ways=5, shots=1, queries=1)
    for head, positions in (("flatten", 25), ("mean", 1)):
        module = ResNet12(head=head).build(spec)
        assert sum(parameter.numel() for parameter in module.parameters()) == body + 640 * positions * 5 + 5


@pytest.mark.parametrize(
    ("shape", "positions"),
    # Four times halved, rounding down.
    [((1, 16, 16), 1), ((1, 28, 28), 1), ((3, 64, 64), 4 * 4), ((3, 84, 84), 5 * 5), ((2, 35, 50), 2 * 3)],
)
@pytest.mark.parametrize("head", ["flatten", "mean"])
def test_resnet12_gives_a_logit_a_way_and_an_embedding_for_images_of_any_size(shape, positions, head):
    spec = classification(shape, ways=4, shots=1, queries=2)
    model = ResNet12(**SMALL, head=head)
    features = 6 * (positions if head == "flatten" else 1)
    assert model.build(spec)(torch.randn(3, *shape)).shape == (3, 4)
    assert model.embed(spec)(torch.randn(3, *shape)).shape == (3, features)
    assert make_network(model.embed(spec), spec, "transductive", embedding=True).output_size == features


@pytest.mark.parametrize("head", ["flatten", "mean"])
@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 33, 40)])
def test_resnet12_computes_what_is_written_out_by_hand(head, shape):
    spec = classification(shape, ways=3, shots=2, queries=2)
    torch.manual_seed(1)
    module = ResNet12(**SMALL, **STILL, head=head).build(spec)
    x = random_episodes(spec, 1).support.x[0]
    network = make_network(module, spec, "transductive")
    weights = {name: value.detach().double() for name, value in module.named_parameters()}
    expected = resnet12_by_hand(list(weights.values()), x, head)
    torch.testing.assert_close(network.outputs(weights, x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 15, 28), (3, 28, 7)])
def test_images_that_pooling_would_halve_to_nothing_are_refused(shape):
    spec = classification(shape, ways=2, shots=1, queries=1)
    message = rf"needs at least 16 x 16 pixels, got {shape[2]} x {shape[1]}\. Use larger images"
    with pytest.raises(ModelError, match=message):
        ResNet12(**SMALL).embed(spec)


def test_resnet12_refuses_vectors():
    with pytest.raises(ModelError, match=r"resnet12 needs images .* the shape \[3\]\. Use model\.name: mlp"):
        ResNet12().build(regression(inputs=3, outputs=2, support_size=4, query_size=5))


@pytest.mark.parametrize(
    "change", [{"widths": (1, 2, 3)}, {"widths": (1, 2, 3, 0)}, {"dropout": 1.0}, {"drop_block_size": 0}]
)
def test_settings_that_make_no_resnet12_are_refused(change):
    with pytest.raises(ValidationError):
        ResNet12(**change)


def test_dropout_is_in_the_first_two_blocks_and_drop_block_in_the_last_two():
    module = ResNet12(**SMALL, dropout=0.2, drop_block_rate=0.3, drop_block_size=2).build(IMAGES)
    drops = [module.get_submodule(f"block{number}.drop") for number in range(1, 5)]
    assert [type(drop) for drop in drops] == [nn.Dropout, nn.Dropout, DropBlock, DropBlock]
    assert [drop.p for drop in drops] == [0.2, 0.2, 0.3, 0.3]
    assert [drop.size for drop in drops[2:]] == [2, 2]


@pytest.mark.parametrize(("shape", "size"), [((9, 9), 3), ((8, 12), 4), ((7, 7), 1), ((3, 6), 5)])
def test_drop_block_drops_whole_squares(shape, size):
    # Rare enough that many maps hold a single square; of size 5 on 3 x 6, squares are 3 x 3.
    torch.manual_seed(0)
    maps = DropBlock(0.05, size)(torch.ones(200, 4, *shape, dtype=torch.float64)) == 0
    side = min(size, *shape)
    squares = F.unfold(maps.double().flatten(0, 1)[:, None], side).all(1)
    whole = F.fold((squares > 0).double()[:, None].expand(-1, side**2, -1), shape, side) > 0
    # Every dropped value belongs to a square that is dropped as a whole.
    assert torch.equal(whole[:, 0], maps.flatten(0, 1))
    dropped = maps.flatten(2).sum(2)
    assert (dropped == side**2).any()
    assert set(dropped[dropped < side**2].tolist()) == {0}


@pytest.mark.parametrize(("shape", "rate", "size"), [((10, 10), 0.1, 5), ((6, 9), 0.3, 2), ((4, 4), 0.25, 7)])
def test_the_share_that_drop_block_keeps_has_its_expectation(shape, rate, size):
    # A value is kept where none of the squares over it begins: (1 - gamma)^(number of such squares).
    side = min(size, *shape)
    starts = torch.ones(1, 1, shape[0] - side + 1, shape[1] - side + 1, dtype=torch.float64)
    gamma = rate / side**2 * shape[0] * shape[1] / starts.numel()
    over = F.conv_transpose2d(starts, torch.ones(1, 1, side, side, dtype=torch.float64))[0, 0]
    expected = ((1 - gamma) ** over).mean()
    torch.manual_seed(1)
    maps = (DropBlock(rate, size)(torch.ones(4000, 2, *shape)) != 0).double()
    shares = maps.mean((2, 3)).flatten()
    assert abs(shares.mean() - expected) < 5 * shares.std() / len(shares) ** 0.5
    # Position by position: not the middle in place of the edges.
    found, spread = maps.mean((0, 1)), maps.flatten(0, 1).std(0)
    assert ((found - (1 - gamma) ** over).abs() < 5 * spread / len(shares) ** 0.5).all()


def test_drop_block_keeps_the_mean_of_a_set_and_scales_all_that_is_left_alike():
    torch.manual_seed(0)
    layer = DropBlock(0.3, 3)
    constant = layer(torch.full((5, 4, 8, 8), 2.0, dtype=torch.float64))
    assert constant.mean() == pytest.approx(2.0, rel=1e-12)
    x = torch.rand(5, 4, 8, 8, dtype=torch.float64) + 1
    y = layer(x)
    ratios = (y / x)[y != 0]
    torch.testing.assert_close(ratios, torch.full_like(ratios, y.numel() / float((y != 0).sum())))


def test_channels_and_examples_have_squares_of_their_own():
    torch.manual_seed(0)
    maps = (DropBlock(0.5, 2)(torch.ones(6, 5, 8, 8)) != 0).flatten(0, 1).flatten(1)
    assert len({tuple(kept.tolist()) for kept in maps}) == 30


def test_drop_block_where_everything_is_dropped_gives_zeros():
    # One square as large as the map, with gamma = 0.99: in one of some draws nothing is left.
    torch.manual_seed(0)
    draws = [DropBlock(0.99, 2)(torch.ones(1, 1, 2, 2)) for _ in range(20)]
    assert all(torch.isfinite(y).all() for y in draws)
    assert any((y == 0).all() for y in draws)


def test_drop_block_draws_from_torchs_default_generator_alone():
    layer, x = DropBlock(0.3, 2), torch.ones(4, 3, 6, 6)
    torch.manual_seed(7)
    first, state = layer(x), torch.get_rng_state()
    second = layer(x)
    torch.manual_seed(7)
    assert torch.equal(layer(x), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("layer", [DropBlock(0.3, 2).eval(), DropBlock(0.0, 2)])
def test_drop_block_does_nothing_in_evaluation_or_without_a_rate(layer):
    x, state = torch.randn(4, 3, 6, 6), torch.get_rng_state()
    assert torch.equal(layer(x), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_in_evaluation_resnet12_computes_as_without_its_regularisers():
    batch = random_episodes(IMAGES, 1)
    outputs = []
    for settings in (STILL, {"dropout": 0.4, "drop_block_rate": 0.4}):
        module = small_resnet12(**settings)
        network = make_network(module, IMAGES, "transductive")
        assert network.is_random == (settings is not STILL)
        params = {name: value.detach().double() for name, value in module.named_parameters()}
        evaluated = network.bind(torch.zeros(0), training=False)
        outputs.append(evaluated.outputs(params, batch.support.x[0]))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("order", ["first", "second"])
def test_maml_through_resnet12_is_the_same_one_by_one_and_all_at_once(order):
    problem = Problem(MAML(inner_lr=0.05, inner_steps=1, order=order), small_resnet12(**STILL), IMAGES)
    batch = random_episodes(IMAGES, 2)
    loop, vmap = (problem.sums(batch, strategy=strategy) for strategy in ("loop", "vmap"))
    assert relative_error(vmap.gradient, loop.gradient) < 1e-10
    if order == "second":
        check_derivatives_along_directions(problem, batch)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_what_the_regularisers_draw_follows_from_the_chunks_first_key(strategy):
    module = small_resnet12(dropout=0.2, drop_block_rate=0.2, drop_block_size=2)
    problem = Problem(MAML(inner_lr=0.05), module, IMAGES, dtype=torch.float32)
    check_that_bits_follow_the_keys(problem, random_episodes(IMAGES, 3, dtype=torch.float32), strategy, compile=False)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.long
def test_compiled_drop_block_draws_by_its_key_too(strategy):
    # One convolution around it: compiling all of ResNet-12 takes too long for a test.
    spec = classification((1, 4, 4), ways=2, shots=2, queries=2)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 1), DropBlock(0.3, 2), nn.Flatten(), nn.Linear(32, 2))
    problem = Problem(MAML(inner_lr=0.05), module, spec, dtype=torch.float32)
    check_that_bits_follow_the_keys(problem, random_episodes(spec, 3, dtype=torch.float32), strategy, compile=True)


def check_that_bits_follow_the_keys(problem, batch, strategy, *, compile):
    compute = MetaGradient(problem.algorithm, problem.network, problem.layout, strategy=strategy, compile=compile)

    def gradient(step):
        keys = [TaskKey(0, "train", step, task) for task in range(3)]
        return compute.sum_chunk(problem.theta, problem.statistics, batch, np.ones(3, np.float32), keys).gradient

    first, other = gradient(0), gradient(1)
    assert np.isfinite(first).all()
    assert np.array_equal(gradient(0), first)
    assert not np.allclose(other, first)
