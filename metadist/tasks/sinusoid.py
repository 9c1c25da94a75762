"""Sinusoid regression."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.keys import TaskKey, generator
from metadist.core.settings import settings


def regression_batch(x: np.ndarray, y: np.ndarray, shots: int) -> EpisodeBatch:
    """Splits points `x, y: [tasks, shots + queries]` into support and query sets of one input and one output."""

    def examples(points: slice) -> Examples:
        return Examples(
            torch.from_numpy(x[:, points, None].astype(np.float32)),
            torch.from_numpy(y[:, points, None].astype(np.float32)),
        )

    return EpisodeBatch(examples(slice(0, shots)), examples(slice(shots, None)))


@settings
class Sinusoid:
    """Sinusoids of Finn et al. 2017 (arXiv:1703.03400, sec. 5.1): y = A sin(x - phase).

    A in [0.1, 5], phase in [0, pi], x in [-5, 5], all uniform. Every split has the same distribution.
    """

    shots: Annotated[int, Field(ge=1)] = 10
    queries: Annotated[int, Field(ge=1)] = 10

    @property
    def spec(self) -> EpisodeSpec:
        return EpisodeSpec(
            kind="regression", input_shape=(1,), output_size=1, support_size=self.shots, query_size=self.queries
        )

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        u = np.stack([generator(key).random(2 + self.shots + self.queries) for key in keys])
        amplitude, phase = 0.1 + 4.9 * u[:, :1], np.pi * u[:, 1:2]
        x = 10 * u[:, 2:] - 5
        return regression_batch(x, amplitude * np.sin(x - phase), self.shots)
