"""Regression over several families of functions, so that a task must be recognised as well as fitted."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey, generator
from metadist.core.settings import settings
from metadist.tasks.sinusoid import regression_batch

SHAPES = ("sinusoid", "line", "parabola", "absolute", "tanh")


@settings
class FunctionShapes:
    """Five shapes of function, each task one of them: multimodal regression after Vuorio et al. 2019
    (arXiv:1910.13616, sec. 5.1), with ranges of our own.

    With a in [0.5, 3], a random sign s, centre c in [-3, 3] and offset b in [-1, 1], x in [-5, 5]:
    sinusoid `a sin(x - c) + b`, line `s a x / 3 + b`, parabola `s a (x - c)^2 / 10 + b`, absolute
    `s a |x - c| / 3 + b`, tanh `s a tanh(x - c) + b`; plus Gaussian noise. Every split has the same
    distribution.
    """

    shots: Annotated[int, Field(ge=1)] = 10
    queries: Annotated[int, Field(ge=1)] = 10
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of the noise on y, in support and query sets alike."""

    @property
    def spec(self) -> EpisodeSpec:
        return EpisodeSpec(
            kind="regression", input_shape=(1,), output_size=1, support_size=self.shots, query_size=self.queries
        )

    def family_of(self, key: TaskKey) -> str:
        """The shape of a task's function."""
        return SHAPES[int(_shape(generator(key).random(1))[0])]

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        points = self.shots + self.queries
        u = np.empty((len(keys), 5 + points))
        noise = np.empty((len(keys), points))
        for row, key in enumerate(keys):
            random = generator(key)
            u[row], noise[row] = random.random(5 + points), random.standard_normal(points)
        shape = _shape(u[:, :1])
        amplitude = 0.5 + 2.5 * u[:, 1:2]
        signed = np.where(u[:, 2:3] < 0.5, -amplitude, amplitude)
        centre, offset = 6 * u[:, 3:4] - 3, 2 * u[:, 4:5] - 1
        x = 10 * u[:, 5:] - 5
        curves = [
            amplitude * np.sin(x - centre),
            signed * x / 3,
            signed * (x - centre) ** 2 / 10,
            signed * np.abs(x - centre) / 3,
            signed * np.tanh(x - centre),
        ]
        y = np.choose(shape, curves) + offset + self.noise * noise
        return regression_batch(x, y, self.shots)


def _shape(u: np.ndarray) -> np.ndarray:
    """Numbers of shapes, of uniform numbers in [0, 1)."""
    return np.minimum((u * len(SHAPES)).astype(int), len(SHAPES) - 1)
