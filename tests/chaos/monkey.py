"""What goes wrong: faults injected between steps, while adapters are at work on the next one."""

import errno
import math
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from metadist import Callback
from metadist.core.plan import Range
from metadist.distributed.ledger import Ledger
from metadist.distributed.ray_executor import RayExecutor
from metadist.distributed.work import Slot
from metadist.run_directory import RunDirectory

STALL_S = 2.0
BREATH_S = 1.0
LONGEST_BREATH_S = 16.0
"""Where a fault is due and there is no occasion for it, the next step is put off; up to twice as long each time."""
FAILURES_OF_STORAGE = 3
SLOW_S = 1.0


@dataclass
class Loss:
    """An adapter that was hurt, until somebody else has its chunks."""

    kind: str
    since: float
    others: str
    """What the adapters were doing then."""


class Monkey(Callback):
    """Injects a schedule's faults, and measures how long it takes until they are made good."""

    def __init__(self, due: deque[tuple[int, str]], cluster: Any, nodes: list[Any], seed: int) -> None:
        self._due, self._cluster, self._nodes = due, cluster, nodes
        self._random = random.Random(seed)
        self._executor: RayExecutor | None = None
        self._nodes_needed = len(nodes)
        self._room_since = 0.0
        self._storage_fails = 0
        self._learner_killed: float | None = None
        self._learner_comes_back = False
        self._away: set[str] = set()
        """Learner or storage, without which the driver itself cannot go on."""
        self._away_until = 0.0
        self._at = 0
        self._breath = BREATH_S
        self._lost_slots: dict[Slot, float] = {}
        self._stalled_until: dict[Slot, float] = {}
        self._asked_for: dict[Slot, float] = {}
        self._lost_actors: dict[Any, Loss] = {}
        self._waiting: dict[tuple[Ledger, Range], Loss] = {}
        self._run_dir = Path()
        self._last_checkpoint = 0
        self.injected: Counter[str] = Counter()
        self.torn: set[int] = set()
        self.steps_made = 0
        self.replays: list[int] = []
        self.other_rollbacks: list[str] = []
        """Steps that were rolled back though no learner was killed, nor looked hung."""
        self.recoveries: dict[str, list[float]] = defaultdict(list)
        self.slow: list[str] = []
        """What the adapters were doing where chunks took more than SLOW_S to be with another."""

    @property
    def left(self) -> list[str]:
        """Faults that there was no occasion for."""
        return [kind for _, kind in self._due]

    def on_start(self, config: Any, run_dir: str, step: int) -> None:
        self._run_dir = Path(run_dir)

    def on_checkpoint(self, step: int) -> None:
        self._last_checkpoint = step

    def on_fault(self, step: int, fault: str, text: str) -> None:
        if fault == "learner_lost":
            if self._learner_killed is None and "was silent for" not in text:
                self.other_rollbacks.append(text)
            self.replays.append(self._at - int(text.rpartition("from step ")[2].rstrip(".")))
            self._learner_comes_back = True

    def on_step(self, step: int, metrics: dict[str, float], status: Any) -> None:
        began = time.monotonic()
        self._do(step)
        now = time.monotonic()

        def began_later(since: float) -> float:
            """The driver sees to what was hurt from now on, or goes on to: what this took itself is no recovery."""
            return min(since + now - began, now)

        for loss in self._lost_actors.values():
            loss.since = began_later(loss.since)
        for slot, since in self._lost_slots.items():
            if self._asked_for.get(slot, 0.0) < since:
                self._lost_slots[slot] = began_later(since)
        if self._learner_killed is not None:
            self._learner_killed = began_later(self._learner_killed)

    def _do(self, step: int) -> None:
        self._at = step
        self.steps_made += 1
        if self._learner_comes_back and self._learner_killed is not None:
            self.recoveries["learner killed: the next step is done"].append(time.monotonic() - self._learner_killed)
            self._learner_killed, self._learner_comes_back = None, False
            self._is_back("learner")
        due = [fault for fault in self._due if fault[0] <= step]
        for fault in due:
            if self._inject(fault[1], step):
                self._due.remove(fault)
                self.injected[fault[1]] += 1
                due.remove(fault)
                self._breath = BREATH_S
                break
        if due:
            self._put_off_the_next_step()

    def _put_off_the_next_step(self) -> None:
        """Until the driver has an adapter to take in: it does so between steps alone, and is not to be kept from it."""
        assert self._executor is not None
        starting = [slot.starting for slot in self._executor._slots if slot.starting is not None]
        if starting:
            ray.wait(starting, num_returns=1, timeout=self._breath)
        else:
            time.sleep(self._breath)
        self._breath = min(2 * self._breath, LONGEST_BREATH_S)

    def _inject(self, kind: str, step: int) -> bool:
        """False where it is not the moment for this fault."""
        if kind.startswith("adapter"):
            return self._hurt_an_adapter(kind)
        if kind == "node removed":
            if not self._nodes or self._num_ready() < 2:
                return False
            node = self._nodes.pop(0)
            if len(self._nodes) < self._nodes_needed:
                self._room_since = math.inf
            self._note(kind, [slot for slot in self._ready() if slot.node == node.node_id])
            self._cluster.remove_node(node, allow_graceful=False)
        elif kind == "node added":
            self._nodes.append(self._cluster.add_node(num_cpus=1))
            if len(self._nodes) >= self._nodes_needed and self._room_since == math.inf:
                self._room_since = time.monotonic()
        elif kind == "storage fails":
            self._storage_fails = FAILURES_OF_STORAGE
        elif kind == "checkpoint torn":
            return self._tear(step)
        else:
            # One at a time, and none whose last checkpoint is torn: what two losses cost is told apart.
            if self._learner_killed is not None or self._last_checkpoint in self.torn:
                return False
            self._learner_killed = time.monotonic()
            self._away.add("learner")
            threading.Timer(self._random.uniform(0, 0.05), self._kill_the_learner).start()
        return True

    def _hurt_an_adapter(self, kind: str) -> bool:
        if self._num_ready() < 2:
            return False
        slot = self._random.choice(self._ready())
        pid = _pid(slot.actor)
        if not _signal_if_there(pid, signal.SIGKILL if kind == "adapter killed" else signal.SIGSTOP):
            return False
        if kind == "adapter stalled":
            threading.Timer(STALL_S, lambda: _signal_if_there(pid, signal.SIGCONT)).start()
            self._stalled_until[slot] = time.monotonic() + STALL_S
        else:
            self._note(kind, [slot])
        return True

    def _tear(self, step: int) -> bool:
        """Cuts off the newest checkpoint that is whole, right after it was written."""
        saved = self._last_checkpoint
        manifest = self._run_dir / f"checkpoints/step_{saved:08d}/manifest.json"
        if saved in self.torn or step - saved > 3 or self._learner_killed is not None or not manifest.exists():
            return False
        path = self._random.choice(sorted(manifest.parent.iterdir()))
        content = path.read_bytes()
        path.write_bytes(content[: self._random.randrange(len(content))])
        self.torn.add(saved)
        return True

    def _kill_the_learner(self) -> None:
        self._learner_killed = time.monotonic()
        assert self._executor is not None
        os.kill(_pid(self._executor._learner.actor), signal.SIGKILL)

    def _ready(self) -> list[Slot]:
        """Adapters that are at work; whoever takes a lost one's chunks is among them."""
        assert self._executor is not None
        now, free = time.monotonic(), self._executor._free()
        return [slot for slot in free if slot not in self._lost_slots and self._stalled_until.get(slot, now) <= now]

    def _num_ready(self) -> int:
        return len(self._ready())

    def _note(self, kind: str, slots: list[Slot]) -> None:
        for slot in slots:
            self._lost_slots[slot] = time.monotonic()
            self._lost_actors[slot.actor] = Loss(kind, time.monotonic(), self._scene())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The run's own classes tell when what was lost is at work again; the storage fails when it is told to."""
        with pytest.MonkeyPatch.context() as patch:
            watched = [(Ledger, "lost"), (Ledger, "submit"), (Ledger, "submit_again")]
            for kind, name in [*watched, (RayExecutor, "_replace"), (RayExecutor, "_admit")]:
                after = getattr(self, f"_after_{name.strip('_')}")
                patch.setattr(kind, name, _watched(getattr(kind, name), after=after))
            patch.setattr(RayExecutor, "start", _watched(RayExecutor.start, before=self._before_start))
            patch.setattr(RunDirectory, "_write", _watched(RunDirectory._write, before=self._before_write))
            yield

    def _before_start(self, executor: RayExecutor, *_: Any) -> None:
        self._executor = executor

    def _before_write(self, *_: Any) -> None:
        if self._storage_fails:
            self._storage_fails -= 1
            self._away.add("storage")
            raise OSError(errno.ETIMEDOUT, "Connection timed out")
        self._is_back("storage")

    def _after_lost(self, lost: list[Range], ledger: Ledger, actor: Any) -> None:
        for span in lost:
            if actor in self._lost_actors:
                self._waiting[ledger, span] = self._lost_actors.pop(actor)

    def _is_back(self, what: str) -> None:
        if what in self._away:
            self._away.remove(what)
            self._away_until = time.monotonic()

    def _chunks_are_elsewhere(self, loss: Loss) -> None:
        alone = not self._away and self._away_until < loss.since
        too = "" if alone else ", while the learner or the storage was away too"
        took = time.monotonic() - loss.since
        self.recoveries[f"{loss.kind}: its chunks are with another{too}"].append(took)
        if took > SLOW_S:
            self.slow.append(f"{loss.kind}, step {self._at}, {took:.2f} s{too}: {loss.others}; then {self._scene()}")

    def _scene(self) -> str:
        """What each adapter is doing."""
        assert self._executor is not None
        free, now, states = self._executor._free(), time.monotonic(), []
        for slot in self._executor._slots:
            state = "starting" if slot.starting is not None else "free" if slot in free else "owes an older call"
            state += ", lost" * (slot in self._lost_slots) + ", stalled" * (self._stalled_until.get(slot, now) > now)
            states.append(f"{(slot.node or '?')[:4]} {state}")
        return " | ".join(states)

    def _after_submit(self, span: Range | None, ledger: Ledger, actor: Any) -> None:
        if span is not None and (lost := self._waiting.pop((ledger, span), None)) is not None:
            self._chunks_are_elsewhere(lost)

    def _after_submit_again(self, result: None, ledger: Ledger, span: Range, actor: Any) -> None:
        for holder in ledger._submitted[span]:
            if holder in self._lost_actors:
                self._chunks_are_elsewhere(self._lost_actors.pop(holder))

    def _after_replace(self, result: None, executor: RayExecutor, slot: Slot, dead: Any) -> None:
        self._asked_for[slot] = time.monotonic()

    def _after_admit(self, result: None, executor: RayExecutor, slot: Slot) -> None:
        if slot.starting is None and slot in self._lost_slots:
            since = self._lost_slots.pop(slot)
            now, where = time.monotonic(), "" if since >= self._room_since else ", where a node was missing"
            self.recoveries[f"a lost adapter is replaced and ready{where}"].append(now - since)
            self.recoveries[f"of that its start, from when it is asked for{where}"].append(now - self._asked_for[slot])


def _nothing(*_: Any) -> None:
    pass


def _watched(method: Any, *, before: Any = _nothing, after: Any = _nothing) -> Any:
    def watched(of: Any, *arguments: Any) -> Any:
        before(of, *arguments)
        result = method(of, *arguments)
        after(result, of, *arguments)
        return result

    return watched


def _pid(actor: Any) -> int:
    return int(ray._private.state.actors(actor._actor_id.hex())["Pid"])


def _signal_if_there(pid: int, number: signal.Signals) -> bool:
    """False where the process has ended already, of itself or with its node."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
