"""Nodes that are about to be taken away: Ray is told of a preemption, and tells it to whoever asks."""

import time
from collections.abc import Callable, Container

import ray

LOOK_EVERY_S = 5.0
"""Notices come half a minute ahead or more; a look takes about a millisecond."""


class DrainingNodes:
    """The ids of nodes that drain, looked up every few seconds."""

    def __init__(self, look: Callable[[], Container[str]] | None = None) -> None:
        self._look = look or _ask_ray
        self._looked = float("-inf")

    def news(self) -> Container[str]:
        """Nodes that drain, where it is time to look again; none otherwise."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return ()
        self._looked = now
        return self._look()


class ThisNode:
    """The node of this process: the driver's, and with it the learner's."""

    def __init__(self, notify: Callable[[str], None], nodes: DrainingNodes | None = None) -> None:
        self._nodes = nodes or DrainingNodes()
        self._notify = notify
        self._drains = False

    def drains(self) -> bool:
        """Whether it is about to be taken away, which is told once."""
        if not self._drains and ray.get_runtime_context().get_node_id() in self._nodes.news():
            self._drains = True
            self._notify("This node is about to be taken away: stopping after this step, with a checkpoint.")
        return self._drains


def _ask_ray() -> Container[str]:
    # Ray's libraries ask the same; there is no public function for it.
    nodes: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return nodes
