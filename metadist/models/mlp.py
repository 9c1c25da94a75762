"""Multi-layer perceptrons."""

import math
from typing import Annotated

from pydantic import Field
from torch import nn

from metadist.core.episode import EpisodeSpec
from metadist.core.settings import settings

Width = Annotated[int, Field(ge=1)]


@settings
class MLP:
    """Fully connected layers with ReLU; MAML's sinusoid net is `hidden: [40, 40]` (Finn et al. 2017, sec. 5.1)."""

    hidden: tuple[Width, ...] = (40, 40)
    batch_norm: bool = False
    """Batch norm before each ReLU."""

    def build(self, spec: EpisodeSpec) -> nn.Module:
        """`[examples, *input_shape] -> [examples, output_size]`; inputs are flattened."""
        body = self.embed(spec)
        width = self.hidden[-1] if self.hidden else math.prod(spec.input_shape)
        return nn.Sequential(*body, nn.Linear(width, spec.output_size))

    def embed(self, spec: EpisodeSpec) -> nn.Sequential:
        """`[examples, *input_shape] -> [examples, last hidden width]`: without the last layer."""
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(spec.input_shape)
        for units in self.hidden:
            layers.append(nn.Linear(width, units))
            if self.batch_norm:
                layers.append(nn.BatchNorm1d(units))
            layers.append(nn.ReLU())
            width = units
        return nn.Sequential(*layers)
