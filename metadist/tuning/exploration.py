"""How a population's members come by other rates: PBT perturbs those of the best, PB2 asks a Gaussian process."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from metadist.errors import UserError
from metadist.sweeps.search_space import Distribution

Rates = dict[str, float]
RESAMPLE = 0.25
"""Probability that a rate is drawn anew from the space (Jaderberg et al. 2017, sec. 4.1.1)."""
FACTORS = (0.8, 1.2)
"""One of which it is multiplied by otherwise."""


@dataclass(frozen=True)
class Member:
    """A trial at the end of a generation."""

    number: int
    score: float
    """More is better."""
    rates: Rates
    """Those of the generation."""


class Perturbation:
    """PBT (Jaderberg et al. 2017, arXiv:1711.09846): each rate times 0.8 or 1.2, or drawn anew."""

    def __init__(self, space: dict[str, Distribution]) -> None:
        self._space = space

    def note(self, step: int, members: list[Member]) -> None:
        """A generation has come to `step`. Perturbing learns nothing from it."""

    def explore(self, member: Member, source: Member, random: np.random.Generator) -> Rates:
        """The rates with which `member` goes on from the theta of `source`; within the space."""
        rates = {}
        for key, distribution in self._space.items():
            low, high = distribution.values
            factor = FACTORS[int(random.integers(len(FACTORS)))]
            is_resampled, drawn = random.random() < RESAMPLE, distribution.sample(random)
            rates[key] = drawn if is_resampled else min(max(source.rates[key] * factor, low), high)
        return rates


class Bandit(Perturbation):
    """PB2 (Parker-Holder et al. 2020, arXiv:2002.02518): a time-varying Gaussian process over what rates gain.

    It learns from each member's gain a step in a generation, given the step, the score that the generation began with,
    and the places of its rates in the space, logarithmic where that is; kernel, fit and acquisition are Tune's. In the
    first generation nothing has been gained on anything, and it perturbs as PBT.
    """

    def __init__(self, space: dict[str, Distribution]) -> None:
        """Raises UserError where scikit-learn, which fits the process, is not installed."""
        if find_spec("sklearn") is None:
            raise UserError(
                "scheduler.name: pb2 needs scikit-learn, which is not installed. Install it with `pip install"
                " 'metadist[tune]'`, or use scheduler.name: pbt."
            )
        super().__init__(space)
        self._began: dict[int, tuple[int, float]] = {}
        """By trial, the step and the score with which its generation began."""
        self._known: list[list[float]] = []
        """Rows of step, score before, and places."""
        self._gains: list[float] = []
        self._chosen: list[list[float]] = []
        """Places that were given since the last generation."""

    def note(self, step: int, members: list[Member]) -> None:
        for member in members:
            if member.number in self._began:
                since, before = self._began[member.number]
                places = [distribution.place(member.rates[key]) for key, distribution in self._space.items()]
                self._known.append([step, before, *places])
                self._gains.append((member.score - before) / (step - since))
        self._before = {member.number: self._began.get(member.number, (0, 0.0))[1] for member in members}
        self._began = {member.number: (step, member.score) for member in members}
        self._chosen = []

    def explore(self, member: Member, source: Member, random: np.random.Generator) -> Rates:
        step, _ = self._began[member.number] = self._began[source.number]
        if not self._gains:
            return super().explore(member, source, random)
        from ray.tune.schedulers.pb2 import _select_config
        from threadpoolctl import threadpool_limits

        given: Any = np.array(self._chosen) if self._chosen else None
        seed = int(random.integers(2**32))
        # One thread: the same bits for any number of cores.
        with numpy_seeded(seed), threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That a length scale of the fit is at its bound.
            found = _select_config(
                np.array(self._known),
                np.array(self._gains),
                given,
                np.array([step, self._before[source.number]]),
                dict.fromkeys(self._space, (0.0, 1.0)),
                num_f=2,
            )
        places = [float(place) for place in found]
        self._chosen.append(places)
        return {key: self._space[key].at(place) for key, place in zip(self._space, places, strict=True)}


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """NumPy's global generator anew from a seed, for code that draws from it; afterwards as it was."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
