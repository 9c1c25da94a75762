"""An adapter that computes nothing: it waits, and gives sums of the true size. So light that a machine holds a hundred.

Imports no torch, which a process of its own for each would not be light with.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import ray

from metadist.core.plan import Plan, Range
from metadist.core.reduction import reduce_tree
from metadist.distributed.receipt import Receipt
from metadist.distributed.seconds import Seconds


class LightSums(NamedTuple):
    """What `Sums` holds."""

    gradient: np.ndarray
    statistics: np.ndarray
    metrics: np.ndarray
    left_out: np.ndarray

    def __add__(self, other: "LightSums") -> "LightSums":  # type: ignore[override]
        return LightSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class LightAdapter:
    """In the place of `AdapterActor`."""

    def __init__(self, theta_size: int, seconds: float) -> None:
        self._gradient = np.full(theta_size, 1e-3, np.float32)
        self._seconds = seconds

    def prepare(self, experiment: list[Any]) -> tuple[dict[str, Any], str]:
        """Fingerprint and node."""
        del experiment
        return {}, ray.get_runtime_context().get_node_id()

    def sample_ahead(self, plan: Plan, span: Range) -> None:
        """There is nothing to sample."""

    def sum_range(self, plan: Plan, span: Range, published: np.ndarray) -> tuple[Receipt, LightSums]:
        """A receipt and sums, after the time that adapting would take."""
        del plan, span, published
        time.sleep(self._seconds)
        sums = LightSums(self._gradient, np.zeros(0, np.float32), np.zeros(2, np.float32), np.zeros(1, np.float32))
        return Receipt(Seconds(adapting=self._seconds)), sums

    def combine(self, span: Range, parts: list[Range], sums: list[Any]) -> tuple[Receipt, LightSums]:
        """As the real one."""
        began = time.perf_counter()
        total = reduce_tree(span, dict(zip(parts, ray.get(sums), strict=True)).get, LightSums.__add__)
        return Receipt(Seconds(reducing=time.perf_counter() - began)), total
