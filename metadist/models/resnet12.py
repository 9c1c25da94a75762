"""ResNet-12, the usual large network of few-shot image classification."""

from collections import OrderedDict
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from metadist.core.episode import EpisodeSpec
from metadist.core.settings import settings
from metadist.errors import ModelError

Width = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
SLOPE = 0.1


@settings
class ResNet12:
    """ResNet-12 (Oreshkin et al. 2018, arXiv:1805.10123) as in Lee et al. 2019 (arXiv:1904.03758, sec. 4.1).

    Four residual blocks of three 3 x 3 convolutions, each with batch norm; the shortcut is a 1 x 1
    convolution with batch norm; then leaky ReLU, 2 x 2 max-pool, and dropout (first two blocks) or
    DropBlock (last two). `head: flatten` keeps positions, as Lee et al.; `mean` averages over them, as
    Oreshkin et al. Differs from the code of Lee et al.: drop rates are not annealed over the first
    batches, since a task's gradient may depend on its key and theta alone; weights start as torch's
    layers do, for the reason given at Conv4.
    """

    widths: tuple[Width, Width, Width, Width] = (64, 160, 320, 640)
    """Channels of each block."""
    dropout: Rate = 0.1
    """Share of values that are dropped after the first two blocks, while training."""
    drop_block_rate: Rate = 0.1
    """About the share of values that DropBlock drops after the last two blocks, while training."""
    drop_block_size: Annotated[int, Field(ge=1)] = 5
    """Side of the squares it drops; on smaller maps, as large as the map."""
    head: Literal["flatten", "mean"] = "flatten"

    def build(self, spec: EpisodeSpec) -> nn.Module:
        """`[examples, channels, height, width] -> [examples, output_size]`."""
        body, features = self._body(spec)
        return nn.Sequential(OrderedDict([*body, ("head", nn.Linear(features, spec.output_size))]))

    def embed(self, spec: EpisodeSpec) -> nn.Module:
        """`[examples, channels, height, width] -> [examples, widths[3] * positions]`: without the last layer."""
        return nn.Sequential(OrderedDict(self._body(spec)[0]))

    def _body(self, spec: EpisodeSpec) -> tuple[list[tuple[str, nn.Module]], int]:
        """The blocks and the pooling, by name, and the number of features that they give."""
        if len(spec.input_shape) != 3:
            raise ModelError(
                f"model.name: resnet12 needs images (channels, height, width), but the task's inputs have the shape"
                f" {list(spec.input_shape)}. Use model.name: mlp."
            )
        channels, height, width = spec.input_shape
        least = 2 ** len(self.widths)
        if min(height, width) < least:
            raise ModelError(
                f"model.name: resnet12 halves images {len(self.widths)} times and needs at least {least} x {least}"
                f" pixels, got {width} x {height}. Use larger images, or model.name: conv4 with downsample: stride."
            )
        blocks: list[tuple[str, nn.Module]] = []
        for number, filters in enumerate(self.widths):
            drop = nn.Dropout(self.dropout) if number < 2 else DropBlock(self.drop_block_rate, self.drop_block_size)
            blocks.append((f"block{number + 1}", _ResidualBlock(channels, filters, drop)))
            channels = filters
        positions = 1 if self.head == "mean" else (height // least) * (width // least)
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if self.head == "mean" else nn.Flatten()
        return [*blocks, ("pool", pool)], channels * positions


class _ResidualBlock(nn.Module):
    """`[examples, channels, height, width] -> [examples, filters, height // 2, width // 2]`."""

    def __init__(self, channels: int, filters: int, drop: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1 = _convolution(channels, filters, 3), nn.BatchNorm2d(filters)
        self.conv2, self.norm2 = _convolution(filters, filters, 3), nn.BatchNorm2d(filters)
        self.conv3, self.norm3 = _convolution(filters, filters, 3), nn.BatchNorm2d(filters)
        self.shortcut = nn.Sequential(_convolution(channels, filters, 1), nn.BatchNorm2d(filters))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE)
        y = F.leaky_relu(self.norm2(self.conv2(y)), SLOPE)
        y = F.leaky_relu(self.norm3(self.conv3(y)) + self.shortcut(x), SLOPE)
        dropped: Tensor = self.drop(F.max_pool2d(y, 2))
        return dropped


def _convolution(channels: int, filters: int, size: int) -> nn.Conv2d:
    # Batch norm behind it takes any bias away.
    return nn.Conv2d(channels, filters, size, padding=size // 2, bias=False)


class DropBlock(nn.modules.dropout._DropoutNd):
    """DropBlock (Ghiasi et al. 2018, arXiv:1810.12890, Alg. 1): drops squares of a map while training.

    Each channel's map has its own squares. Where a whole square fits, one begins with the probability

        gamma = rate / size^2 * (height * width) / ((height - size + 1) * (width - size + 1))   (eq. 1)

    and what is left is multiplied by (values / values left), over all of `x`, which keeps its mean.
    Squares overlap, so that somewhat less than `rate` is dropped. On a map smaller than `size`, squares
    are as large as its shorter side.
    """

    def __init__(self, rate: float, size: int) -> None:
        super().__init__(p=rate)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = 1 - self._squares(x)
        return x * kept * (kept.numel() / kept.sum().clamp(min=1))

    def _squares(self, x: Tensor) -> Tensor:
        """1 where `x: [examples, channels, height, width]` is dropped, 0 elsewhere."""
        height, width = x.shape[-2:]
        size = min(self.size, height, width)
        starts = (height - size + 1, width - size + 1)
        gamma = self.p / size**2 * (height * width) / (starts[0] * starts[1])
        seeds = (torch.rand(*x.shape[:-2], *starts, dtype=x.dtype, device=x.device) < gamma).to(x.dtype)
        return F.max_pool2d(F.pad(seeds, [size - 1] * 4), size, stride=1)

    def extra_repr(self) -> str:
        return f"p={self.p}, size={self.size}"
