"""Learned inner rates (Meta-SGD, MAML++, learn_inner_lr) as numbers for a map."""

from dataclasses import dataclass

import numpy as np
import torch

from metadist.algorithms.inner_loop import RATE
from metadist.distributed.learner import LearnerState
from metadist.experiment import Experiment

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class LearnedRates:
    """One row a parameter tensor, one column an inner step; or quantiles, where every number has a rate."""

    parameters: list[str]
    columns: list[str]
    values: np.ndarray
    """float64 `[parameters, columns]`."""
    start: float
    """What all of them started from."""
    negative: float
    """Share of all rates that are below 0."""


def learned_rates(experiment: Experiment, state: LearnerState) -> LearnedRates | None:
    """None where the inner rate is a setting."""
    meta = experiment.theta.unflatten(torch.tensor(state.theta))
    rates = {name: value.double().numpy() for name, value in meta.items() if name.split("/")[0] == RATE}
    if not rates:
        return None
    per_element = any(
        value.shape == tuple(meta[name.partition("/")[2]].shape) and value.ndim > 1
        for name, value in rates.items()
        if name.partition("/")[2] in meta
    )
    names = [name.partition("/")[2] or "all parameters" for name in rates]
    everything = np.concatenate([value.reshape(-1) for value in rates.values()])
    if per_element:
        columns = [f"{100 * q:.0f} %" if q != 0.5 else "median" for q in QUANTILES]
        values = np.stack([np.quantile(value, QUANTILES) for value in rates.values()])
    else:
        values = np.stack([np.atleast_1d(value) for value in rates.values()])
        columns = [f"step {step + 1}" for step in range(values.shape[1])] if values.shape[1] > 1 else ["rate"]
    start = float(getattr(experiment.algorithm, "inner_lr", float("nan")))
    return LearnedRates(names, columns, values, start, float((everything < 0).mean()))
