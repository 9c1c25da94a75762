"""Where the sums of many adapters meet before the learner takes them: along the tree, near to where they lie.

The learner takes as many sums as fit into `LEARNER_TAKES_BYTES`, so that what it receives in a step does not grow
with the number of adapters. Where there is more, adapters add up aligned ranges first, level by level: up to
`NEAR` sums that lie on one node, where nothing is sent, and from node to node two at a time, so that no link carries
more than one sum a level. A level is decided by where the sums lie; by the tree (`core/reduction.py`) no bit is.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import ray

from metadist.core.plan import Plan, Range
from metadist.distributed.ledger import Ledger
from metadist.distributed.pace import Pace
from metadist.distributed.work import Result, Work

LEARNER_TAKES_BYTES = 8 << 20
NEAR = (8, 4)
"""Sums that one adapter adds up, where all of each group lie on one node; the first number for which they do."""
FAR = 2
"""Otherwise."""


def next_level(plan: Plan, nodes: Mapping[Range, str | None]) -> dict[Range, list[Range]]:
    """Larger aligned ranges that cover the plan, each with its parts, given the `nodes` on which parts lie."""
    size = 1 << (max(span.stop - span.start for span in nodes) - 1).bit_length()
    for number in NEAR:
        groups = _grouped(plan, number * size, nodes)
        if all(len({nodes[part] for part in parts}) == 1 for parts in groups.values()):
            return groups
    return _grouped(plan, FAR * size, nodes)


def combination(
    plan: Plan, theta: ray.ObjectRef, groups: dict[Range, list[Range]], sums: dict[Range, Result], pace: Pace
) -> Work:
    """One level: each range of several parts is to be added up where the first of them lies."""

    def submit(actor: Any, span: Range) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        references = [sums[part].reference for part in groups[span]]
        call: tuple[ray.ObjectRef, ray.ObjectRef] = actor.combine.options(num_returns=2).remote(
            span, groups[span], references
        )
        return call

    homes = {span: sums[parts[0]].node for span, parts in groups.items() if len(parts) > 1}
    sizes = {span: len(groups[span]) for span in homes}
    ledger = Ledger(f"step {plan.step}, combining", homes, divisible=False)
    return Work(plan, theta, ledger, submit, pace, homes=homes, sizes=sizes)


def as_handed_out(spans: Iterable[Range], handed_out: list[Range]) -> list[Range]:
    """Aligned ranges, the larger ones divided into those that are `handed_out` to adapters."""
    divided = []
    for span in spans:
        inside = [part for part in handed_out if span.start <= part.start and part.stop <= span.stop]
        divided += inside or [span]
    return divided


def _grouped(plan: Plan, size: int, spans: Iterable[Range]) -> dict[Range, list[Range]]:
    groups: dict[Range, list[Range]] = {span: [] for span in plan.aligned(size)}
    for span in sorted(spans):
        start = span.start // size * size
        groups[Range(start, min(start + size, plan.num_chunks))].append(span)
    return groups
