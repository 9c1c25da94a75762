"""Algorithms by the name that a config gives them."""

from metadist.algorithms.maml import MAML

ALGORITHMS: dict[str, type] = {
    "maml": MAML,
}
