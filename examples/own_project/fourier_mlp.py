"""A model of one's own."""

import torch
from torch import nn

from metadist import EpisodeSpec, settings


class Fourier(nn.Module):
    """`[examples, 1] -> [examples, 2 * frequencies]`: sin(k x) and cos(k x) for k = 1, 2, .."""

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("k", torch.arange(1.0, frequencies + 1))

    def forward(self, x):
        return torch.cat([torch.sin(self.k * x), torch.cos(self.k * x)], dim=-1)


@settings
class FourierMLP:
    """One hidden layer over Fourier features of a single input."""

    frequencies: int = 3
    hidden: int = 40

    def build(self, spec: EpisodeSpec) -> nn.Module:
        features = 2 * self.frequencies
        return nn.Sequential(
            Fourier(self.frequencies),
            nn.Linear(features, self.hidden),
            nn.Tanh(),
            nn.Linear(self.hidden, spec.output_size),
        )
