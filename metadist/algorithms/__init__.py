"""Algorithms by the name that a config gives them."""

from metadist.algorithms.maml import MAML
from metadist.algorithms.meta_curvature import MetaCurvature

ALGORITHMS: dict[str, type] = {
    "maml": MAML,
    "meta_curvature": MetaCurvature,
}
