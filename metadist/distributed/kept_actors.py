"""Actors that one run leaves to the next: to start one takes seconds, nearly all of them torch's import."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError

from metadist.sections import ScalingSettings

ANSWERS_WITHIN_S = 5.0
"""An idle actor that does not answer in this time is ended, and another one started."""


@dataclass
class _Kept:
    """Idle actors by their class, all of one run, which had room for them."""

    scaling: ScalingSettings | None = None
    actors: dict[type, list[Any]] = field(default_factory=dict)

    def end(self) -> None:
        actors, self.actors = self.actors, {}
        if ray.is_initialized():  # Else they have ended with it, and a call would start another Ray.
            for actor in (actor for those in actors.values() for actor in those):
                ray.kill(actor)


_kept: _Kept | None = None


@contextmanager
def actors_kept() -> Iterator[None]:
    """Until its end, a run leaves its actors to the next one in this process, if that asks for the same ones."""
    global _kept
    if _kept is not None:
        yield
        return
    _kept = kept = _Kept()
    try:
        yield
    finally:
        _kept = None
        kept.end()


def end_kept_but(scaling: ScalingSettings, number: dict[type, int]) -> None:
    """Ends idle actors that a run has no use for, before it asks for others: what they reserve may be all there is."""
    if _kept is None:
        return
    if _kept.scaling is None or replace(_kept.scaling, num_workers=scaling.num_workers) != scaling:
        _kept.end()
    for kind, actors in _kept.actors.items():
        for actor in actors[number.get(kind, 0) :]:
            ray.kill(actor)
        del actors[number.get(kind, 0) :]


def take(kind: type) -> Any:
    """An idle actor of a class, which has to be prepared anew; None where there is none."""
    while _kept is not None and _kept.actors.get(kind):
        actor = _kept.actors[kind].pop(0)
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=ANSWERS_WITHIN_S)
        except RayError:  # It has died meanwhile, or hangs.
            ray.kill(actor)
        else:
            return actor
    return None


def leave(kind: type, actor: Any, scaling: ScalingSettings) -> None:
    """Keeps an actor that has nothing left to do for the next run, or ends it where none is expected."""
    if _kept is None:
        ray.kill(actor)
        return
    _kept.scaling = scaling
    _kept.actors.setdefault(kind, []).append(actor)
