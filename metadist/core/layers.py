"""Layers of torch that compute the same in another way where they are compiled for a CPU.

Called without the compiler, they are torch's own.
"""

from typing import cast

from torch import Tensor, nn

from metadist.core.compiled import is_traced
from metadist.core.convolution import Pair, convolve
from metadist.core.pooling import max_pool


class PatchConv2d(nn.Conv2d):
    """`nn.Conv2d` by `convolution.convolve`: parameters, shapes and results are those of its base."""

    def forward(self, x: Tensor) -> Tensor:
        """`[images, channels, height, width]`; a single image without the first axis goes the way of the base."""
        if not is_traced() or x.dim() != 4 or not len(x):
            return super().forward(x)
        weight, stride, padding = self.weight.permute(0, 2, 3, 1), cast(Pair, self.stride), cast(Pair, self.padding)
        y = convolve(x.permute(0, 2, 3, 1), weight, stride, padding).permute(0, 3, 1, 2)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class WindowMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` by `pooling.max_pool`, where windows do not overlap."""

    def forward(self, x: Tensor) -> Tensor:
        """`[images, channels, height, width]`."""
        if not is_traced() or x.dim() != 4:
            return cast(Tensor, super().forward(x))
        return max_pool(x.permute(0, 2, 3, 1), cast(int, self.kernel_size)).permute(0, 3, 1, 2)


def with_layers_for_the_compiler(module: nn.Module) -> nn.Module:
    """`module` with those of its layers that are among these, in place; others stay as they are."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _is_plain(layer):
            layer.__class__ = PatchConv2d
        if type(layer) is nn.MaxPool2d and _has_plain_windows(layer):
            layer.__class__ = WindowMaxPool2d
    return module


def _is_plain(layer: nn.Conv2d) -> bool:
    is_dense = layer.groups == 1 and layer.dilation == (1, 1)
    return is_dense and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _has_plain_windows(layer: nn.MaxPool2d) -> bool:
    is_square = isinstance(layer.kernel_size, int) and layer.stride == layer.kernel_size
    return is_square and (layer.padding, layer.dilation) == (0, 1) and not (layer.ceil_mode or layer.return_indices)
