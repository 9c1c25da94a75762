"""Where actors go: what each needs, and whether the cluster has it."""

from collections.abc import Callable
from typing import Any

from metadist.errors import ClusterError
from metadist.sections import ScalingSettings

LEARNER_CPUS = 0
"""The learner steps while the adapters wait, so it takes no CPU of its own from them."""


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
        "max_restarts": 0,
        "max_task_retries": 0,
        # None, and not "DEFAULT": an actor started within a placement group (a trial of Tune) then stays in it.
        "scheduling_strategy": "SPREAD" if scaling.placement_strategy == "SPREAD" else None,
    }


def check_fits(scaling: ScalingSettings, nodes: list[dict[str, float]], may_grow: Callable[[], bool]) -> None:
    """Raises ClusterError where the least number of adapters has no room on `nodes` (resources by node).

    `may_grow` is asked only then: whether other nodes may come.
    """
    needed = {name: amount for name, amount in resources_per_adapter(scaling).items() if amount > 0}
    room = 0
    for node in nodes:
        room += min((int(node.get(name, 0) / amount + 1e-9) for name, amount in needed.items()), default=10**6)
    least = scaling.worker_limits[0]
    if room < least and not may_grow():
        has = ", ".join(f"{name} {sum(node.get(name, 0) for node in nodes):g}" for name in needed)
        each = ", ".join(f"{name} {amount:g}" for name, amount in needed.items())
        raise ClusterError(
            f"scaling.num_workers: {least} adapters of {each} each do not fit the cluster, which has {has} on"
            f" {len(nodes)} node{'s' if len(nodes) != 1 else ''}: room for {room}."
            f" {f'Lower --workers to {room}, or add' if room else 'Add'} nodes."
        )
