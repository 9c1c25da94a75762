"""An adapter that computes nothing: it waits, and gives sums of the true size. So light that a machine holds a hundred.

Imports no torch, which a process of its own for each would not be light with.
"""

import time
from typing import Any

import numpy as np

from metadist.core.plan import Plan, Range
from metadist.distributed.receipt import Receipt
from metadist.distributed.seconds import Seconds


class LightAdapter:
    """In the place of `AdapterActor`."""

    def __init__(self, theta_size: int, seconds: float) -> None:
        self._gradient = np.full(theta_size, 1e-3, np.float32)
        self._seconds = seconds

    def prepare(self, experiment: list[Any]) -> tuple[dict[str, Any], str]:
        """Fingerprint and node."""
        del experiment
        return {}, "this"

    def sample_ahead(self, plan: Plan, span: Range) -> None:
        """There is nothing to sample."""

    def sum_range(self, plan: Plan, span: Range, published: np.ndarray) -> tuple[Receipt, tuple[np.ndarray, ...]]:
        """A receipt, and what `Sums` holds: gradient, statistics, metrics, number of tasks that were left out."""
        del plan, span, published
        time.sleep(self._seconds)
        sums = (self._gradient, np.zeros(0, np.float32), np.zeros(2, np.float32), np.zeros(1, np.float32))
        return Receipt(Seconds(adapting=self._seconds)), sums
