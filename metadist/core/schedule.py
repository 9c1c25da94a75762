"""Rates that change at given outer steps, as population-based training finds them."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

Changes = tuple[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0)]], ...]
"""(step, rate): from outer step `step` on, counted from 0, the rate is `rate`."""


def rate_at(step: int, rate: float, changes: Changes | None) -> float:
    """What a rate is in outer step `step`, having been `rate` before the first change."""
    return next((changed for since, changed in reversed(changes or ()) if since <= step), rate)


def check_order(key: str, changes: Changes | None) -> None:
    """Raises ValueError, as settings do, where steps do not rise."""
    steps: Sequence[int] = [step for step, _ in changes or ()]
    if list(steps) != sorted(set(steps)):
        raise ValueError(f"{key} must have rising steps, got {list(steps)}. Sort its pairs of [step, rate].")
