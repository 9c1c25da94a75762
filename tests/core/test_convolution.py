import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from metadist.core import convolution
from metadist.core.compiled import traced
from metadist.core.layers import PatchConv2d, WindowMaxPool2d, with_layers_for_the_compiler
from metadist.experiment import make_experiment
from metadist.models import Conv4
from metadist.sections import TrainingSettings
from tests.builders import classification, random_episodes, tiny_config

# Kernel, stride and padding: those of Conv-4, and some that tell height from width.
GEOMETRIES = [((3, 3), 1, 1), ((3, 3), 2, 1), ((3, 2), (2, 1), (0, 2)), ((1, 1), 1, 0), ((1, 1), 2, 0)]


@pytest.fixture(params=["patches", "onednn"])
def route(request, monkeypatch):
    if request.param == "onednn":
        monkeypatch.setattr(convolution, "PATCH_BYTES", 0)


@pytest.fixture(autouse=True)
def _as_for_the_compiler():
    with traced():
        yield


def pair(kernel, stride, padding, bias=True):
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 4, kernel, stride, padding, bias=bias).double()
    return plain, with_layers_for_the_compiler(copy.deepcopy(plain))


def both_orders(layer, x, params):
    """First- and second-order gradients by images and parameters, none of whose terms vanishes."""

    def first(x, params):
        return grad(lambda x, params: (functional_call(layer, params, (x,)) ** 3).sum(), argnums=(0, 1))(x, params)

    def squares(x, params):
        by_x, by_params = first(x, params)
        return (by_x**2).sum() + sum((value**2).sum() for value in by_params.values())

    return first(x, params), grad(squares, argnums=(0, 1))(x, params)


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
@pytest.mark.usefixtures("route")
def test_values_and_gradients_of_both_orders_are_those_of_torch(kernel, stride, padding):
    plain, patches = pair(kernel, stride, padding)
    assert type(patches) is PatchConv2d
    x = torch.randn(5, 5, 7, 6, dtype=torch.float64)
    params = {name: value.detach() for name, value in plain.named_parameters()}
    torch.testing.assert_close(patches(x), plain(x))
    torch.testing.assert_close(both_orders(patches, x, params), both_orders(plain, x, params))


def test_a_third_derivative_through_two_layers_is_that_of_torch():
    # Images of the second layer depend on the weights, too: no argument of the three functions is a constant.
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 3, 3, stride=2, padding=1, bias=False).double()
    patches = with_layers_for_the_compiler(copy.deepcopy(plain))
    x, w = torch.randn(2, 3, 7, 7, dtype=torch.float64), plain.weight.detach()

    def third(layer):
        def once(w, x):
            return functional_call(layer, {"weight": w}, (x,))

        function = lambda w: (once(w, once(w, x)) ** 2).sum()  # noqa: E731
        for _ in range(2):
            function = lambda w, inner=function: (grad(inner)(w) ** 2).sum()  # noqa: E731
        return grad(function)(w)

    torch.testing.assert_close(third(patches), third(plain), rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(5, 7, 6), (0, 5, 7, 6)])
def test_a_single_image_and_no_image_are_taken_as_torch_takes_them(shape):
    plain, patches = pair((3, 3), 2, 1)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(patches(x), plain(x))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(4, 4, 3),
        Doubled(4, 4, 3),
    ],
)
def test_convolutions_that_are_not_plain_stay_as_they_are(layer):
    before = type(layer)
    assert type(with_layers_for_the_compiler(nn.Sequential(layer))[0]) is before


class Images:
    spec = classification((1, 16, 16), ways=3, shots=1, queries=2)

    def sample(self, keys):
        return random_episodes(self.spec, len(keys), seed=keys[0].task, dtype=torch.float32)


@pytest.mark.parametrize(("size", "shape"), [(2, (3, 2, 6, 4)), (2, (3, 2, 7, 5)), (3, (2, 1, 9, 10))])
def test_the_first_largest_of_a_window_is_taken_and_gets_the_gradient_as_torch_has_it(size, shape):
    plain = nn.MaxPool2d(size)
    windows = with_layers_for_the_compiler(copy.deepcopy(plain))
    assert type(windows) is WindowMaxPool2d
    # Whole numbers of a small range: nearly every window has equal values.
    x = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).double()
    x[0, 0, 0, 1] = torch.nan
    weights = torch.arange(plain(x).numel(), dtype=torch.float64).view_as(plain(x))

    def first(layer, x):
        return grad(lambda x: (layer(x) ** 2 * weights).sum())(x)

    def second(layer, x):
        return grad(lambda x: (first(layer, x) ** 2).sum())(x)

    for function in (lambda layer, x: layer(x), first, second):
        torch.testing.assert_close(function(windows, x), function(plain, x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "layer",
    [nn.MaxPool2d(2, stride=1), nn.MaxPool2d((2, 3)), nn.MaxPool2d(3, padding=1), nn.MaxPool2d(2, ceil_mode=True)],
)
def test_pools_whose_windows_overlap_or_are_cut_stay_as_they_are(layer):
    assert type(with_layers_for_the_compiler(nn.Sequential(layer))[0]) is nn.MaxPool2d


def test_without_the_compiler_they_are_torchs_own(monkeypatch):
    plain, patches = pair((3, 3), 1, 1)
    monkeypatch.setattr("metadist.core.layers.is_traced", lambda: False)
    monkeypatch.setattr("metadist.core.layers.convolve", None)
    x = torch.randn(5, 5, 7, 6, dtype=torch.float64)
    assert torch.equal(patches(x), plain(x))


@pytest.mark.parametrize(("strategy", "expected"), [("auto", PatchConv2d), ("loop", PatchConv2d), ("vmap", nn.Conv2d)])
def test_an_experiment_uses_them_where_tasks_are_adapted_one_by_one(strategy, expected):
    training = TrainingSettings(batch_norm="transductive", strategy=strategy, compile=False)
    experiment = make_experiment(tiny_config(model=Conv4(filters=4), training=training, task=Images()))
    layers = experiment.network.skeletons["own", True].modules()
    assert [type(layer) for layer in layers if isinstance(layer, nn.Conv2d)] == [expected] * 4
