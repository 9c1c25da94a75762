"""Calibration of a classifier: whether predictions made with a confidence of p come true in a share p of cases.

Guo et al. 2017 (arXiv:1706.04599), sec. 2. A prediction's confidence is its largest softmax probability. Bin m of M
holds those with confidence in ((m - 1) / M, m / M], and over all n predictions (eq. 3)

    ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)|  =  sum_m |correct_m - confidence_m| / n

with sums over a bin on the right: so what each episode gives is added up, whoever computed it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS = 15
"""M, as in the paper's tables."""


def bin_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """`[3, BINS]`: by bin, the number of predictions, the sum of their confidences, and how many are right.

    `logits: [examples, ways]`. NaN among the logits makes the confidences NaN.
    """
    confidence, predicted = torch.softmax(logits, -1).max(-1)
    inner_edges = torch.arange(1, BINS, dtype=logits.dtype, device=logits.device) / BINS
    number = (confidence[:, None] > inner_edges).sum(-1)
    member = (number[:, None] == torch.arange(BINS, device=logits.device)).to(logits.dtype)
    values = torch.stack([torch.ones_like(confidence), confidence, (predicted == targets).to(logits.dtype)])
    return (values[:, :, None] * member).sum(1)


@dataclass(frozen=True)
class Calibration:
    """Sums over predictions by bin of their confidence; the lowest bin first."""

    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    correct: tuple[float, ...]

    @classmethod
    def of(cls, sums: np.ndarray) -> "Calibration":
        """Of the `[episodes, 3, BINS]` sums of all episodes."""
        counts, confidence, correct = sums.astype(np.float64).sum(0)
        return cls(tuple(map(int, counts)), tuple(confidence.tolist()), tuple(correct.tolist()))

    @property
    def ece(self) -> float:
        """The expected calibration error, between 0 and 1."""
        return float(np.abs(np.subtract(self.correct, self.confidence)).sum() / sum(self.counts))

    def as_dict(self) -> dict[str, Any]:
        """The error and each bin's edges, count, mean confidence and accuracy (None in an empty bin)."""
        bins = [
            {
                "lower": number / BINS,
                "upper": (number + 1) / BINS,
                "count": count,
                "confidence": confidence / count if count else None,
                "accuracy": correct / count if count else None,
            }
            for number, (count, confidence, correct) in enumerate(
                zip(self.counts, self.confidence, self.correct, strict=True)
            )
        ]
        return {"ece": self.ece, "bins": bins}
