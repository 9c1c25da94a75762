"""Where actors go: what each needs, and whether the cluster has it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.errors import ClusterError
from metadist.sections import ScalingSettings

LEARNER_CPUS = 0
"""The learner steps while the adapters wait, so it takes no CPU of its own from them."""

ROUNDING = 1e-9


class Node(NamedTuple):
    """A node of a cluster: what it has by Ray's resource names, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = {}


def resources_per_adapter(scaling: ScalingSettings) -> dict[str, float]:
    """What one adapter reserves, by Ray's resource names."""
    resources = dict(scaling.resources_per_worker)
    if scaling.use_gpu:
        resources.setdefault("GPU", 1.0)
    return resources


def adapter_options(scaling: ScalingSettings) -> dict[str, Any]:
    """Options of an adapter actor. Lost calls and actors are ours to replace: the ledger decides."""
    resources = resources_per_adapter(scaling)
    return {
        "num_cpus": resources.pop("CPU", 0),
        "num_gpus": resources.pop("GPU", 0),
        "resources": resources,
        "label_selector": scaling.label_selector or None,
        "max_restarts": 0,
        "max_task_retries": 0,
        # None, and not "DEFAULT": an actor started within a placement group (a trial of Tune) then stays in it.
        "scheduling_strategy": "SPREAD" if scaling.placement_strategy == "SPREAD" else None,
    }


def learner_options(scaling: ScalingSettings) -> dict[str, Any]:
    """Options of the learner's actor."""
    return {
        "num_cpus": LEARNER_CPUS,
        "num_gpus": scaling.learner_gpus,
        "scheduling_strategy": beside_the_driver(),
    }


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """Where the learner goes, whose checkpoints the driver writes: its node, which is not one that may be reclaimed.

    A soft affinity would not do: Ray then places actors that reserve no CPU on any node.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def check_learner_fits(scaling: ScalingSettings, drivers: Node) -> None:
    """Raises ClusterError where the driver's node has no GPU for the learner."""
    there = drivers.resources.get("GPU", 0)
    if scaling.backend == "actors" and scaling.learner_gpus > there:
        raise ClusterError(
            f"scaling.learner_gpus: {scaling.learner_gpus:g} do not fit the node of this process, which has GPU"
            f" {there:g}; the learner is beside it. Set it to 0, or start the run on a node with a GPU."
        )


def check_fits(scaling: ScalingSettings, nodes: list[Node], may_grow: Callable[[], bool]) -> None:
    """Raises ClusterError where the least number of adapters has no room on the nodes whose labels are asked for.

    `may_grow` is asked only then: whether other nodes may come.
    """
    needed = {name: amount for name, amount in resources_per_adapter(scaling).items() if amount > 0}
    selector = scaling.label_selector
    eligible = [node for node in nodes if all(matches(node.labels.get(key), rule) for key, rule in selector.items())]
    room = room_for(needed, eligible)
    least = scaling.worker_limits[0]
    if room < least and not may_grow():
        has = ", ".join(f"{name} {sum(node.resources.get(name, 0) for node in eligible):g}" for name in needed)
        each = ", ".join(f"{name} {amount:g}" for name, amount in needed.items())
        where = f"{len(eligible)} node{'s' if len(eligible) != 1 else ''}"
        if selector:
            where += f" of {len(nodes)} with {', '.join(f'{key}: {rule}' for key, rule in selector.items())}"
        raise ClusterError(
            f"scaling.num_workers: {least} adapters of {each} each do not fit the cluster, which has {has} on"
            f" {where}: room for {room}. {f'Lower --workers to {room}, or add' if room else 'Add'} nodes."
        )


def room_for(needed: Mapping[str, float], nodes: Sequence[Node]) -> int:
    """How many adapters, each of which needs so much of one node, all nodes hold together."""
    return sum(_room(node, needed) for node in nodes)


def _room(node: Node, needed: Mapping[str, float]) -> int:
    """How many adapters a node holds."""
    return min((_times(amount, node.resources.get(name, 0), name) for name, amount in needed.items()), default=10**6)


def _times(amount: float, there: float, resource: str) -> int:
    """How many times an amount is there. Adapters share a GPU, but none has parts of two."""
    if resource == "GPU" and amount < 1:
        return int(there + ROUNDING) * int(1 / amount + ROUNDING)
    return int(there / amount + ROUNDING)


def matches(label: str | None, rule: str) -> bool:
    """Whether a node's label (None: it has none) follows a rule of Ray's: `a`, `!a`, `in(a,b)` or `!in(a,b)`."""
    found = re.fullmatch(r"(!?)(?:in\((.*)\)|(.*))", rule)
    assert found, "every text is a rule"
    negated, several, one = found.groups()
    named = [one] if several is None else [value.strip() for value in several.split(",")]
    return (label in named) != bool(negated)
