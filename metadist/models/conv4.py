"""Four convolutional blocks, the usual small network of few-shot image classification."""

from collections import OrderedDict
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from metadist.core.episode import EpisodeSpec
from metadist.core.settings import settings
from metadist.errors import ModelError

NUM_BLOCKS = 4


@settings
class Conv4:
    """Conv-4 (Vinyals et al. 2016, arXiv:1606.04080, sec. 4.1): 3 x 3 convolution, batch norm, ReLU, downsampling.

    `downsample: stride` convolves with stride 2 (MAML on Omniglot); `max_pool` pools 2 x 2 after ReLU
    (miniImageNet). `head: mean` averages over positions before the last layer, as MAML's code does on
    Omniglot; `flatten` keeps them. Weights start as torch's layers do: with batch norm behind it, a
    convolution's effective step size goes with 1 / |weight|^2, and these start smaller than Glorot's.
    """

    filters: Annotated[int, Field(ge=1)] = 64
    downsample: Literal["stride", "max_pool"] = "max_pool"
    head: Literal["flatten", "mean"] = "flatten"

    def build(self, spec: EpisodeSpec) -> nn.Module:
        """`[examples, channels, height, width] -> [examples, output_size]`."""
        body, features = self._body(spec)
        return nn.Sequential(OrderedDict([*body, ("head", nn.Linear(features, spec.output_size))]))

    def embed(self, spec: EpisodeSpec) -> nn.Module:
        """`[examples, channels, height, width] -> [examples, filters * positions]`: without the last layer."""
        return nn.Sequential(OrderedDict(self._body(spec)[0]))

    def _body(self, spec: EpisodeSpec) -> tuple[list[tuple[str, nn.Module]], int]:
        """The blocks and the pooling, by name, and the number of features that they give."""
        if len(spec.input_shape) != 3:
            raise ModelError(
                f"model.name: conv4 needs images (channels, height, width), but the task's inputs have the shape"
                f" {list(spec.input_shape)}. Use model.name: mlp."
            )
        channels, height, width = spec.input_shape
        blocks: list[tuple[str, nn.Module]] = []
        for number in range(NUM_BLOCKS):
            if self.downsample == "max_pool":
                height, width = height // 2, width // 2
            else:
                height, width = -(-height // 2), -(-width // 2)
            if min(height, width) < 1:
                raise ModelError(
                    f"model.downsample: {self.downsample} halves images of {list(spec.input_shape[1:])} to nothing in"
                    f" block {number + 1} of {NUM_BLOCKS}. Use larger images or downsample: stride."
                )
            blocks.append((f"block{number + 1}", self._block(channels)))
            channels = self.filters
        positions = 1 if self.head == "mean" else height * width
        pool: nn.Module = _MeanOverPositions() if self.head == "mean" else nn.Flatten()
        return [*blocks, ("pool", pool)], self.filters * positions

    def _block(self, channels: int) -> nn.Sequential:
        strided = self.downsample == "stride"
        block = OrderedDict[str, nn.Module](
            conv=nn.Conv2d(channels, self.filters, 3, stride=2 if strided else 1, padding=1),
            norm=nn.BatchNorm2d(self.filters),
            relu=nn.ReLU(),
        )
        if not strided:
            block["pool"] = nn.MaxPool2d(2)
        return nn.Sequential(block)


class _MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(x, (2, 3))
