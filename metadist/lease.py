"""The lease of a run directory: one process trains in it at a time."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from metadist.errors import MetadistError, RunDirectoryError
from metadist.run_directory import RunDirectory

LEASE_FILE = "lease.json"
BEAT_S = 5.0
EXPIRES_S = 30.0
"""A holder whose beat does not change for so long is taken for dead."""
SETTLE_S = 1.0
"""In an object store: how long a newcomer waits before it looks whether its lease is still there."""


class Lease:
    """A file with the holder's name and a beat, a number that the holder raises every few seconds.

    Promised: a second process is refused while the holder lives and its beats arrive; a holder that is gone is
    replaced, at once where it ran on this machine (its process is provably no more), otherwise after its beat
    stood still for EXPIRES_S by the newcomer's own monotonic clock. Clocks of two machines are never compared.
    On one machine newcomers decide one after another, under a file lock.

    Not promised: exclusion at every instant. A holder that is suspended, or cut off from its storage, for longer than
    EXPIRES_S may be replaced; it learns of that at its first beat afterwards and stops with an error, and
    may have written until then. An object store has no lock: of two newcomers the last to write has the
    lease, as long as a write takes less than SETTLE_S.
    """

    def __init__(self, directory: RunDirectory, tell: Callable[[str], None]) -> None:
        self._directory, self._tell = directory, tell
        self._id = uuid.uuid4().hex
        self._mine: dict[str, Any] | None = None
        self._over = threading.Event()
        self._taken_by: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lease and begins to beat; does nothing where it is held already. Raises RunDirectoryError."""
        if self._mine is not None:
            return
        with _one_at_a_time(self._directory):
            self._wait_until_free()
            mine = {"holder": self._id, "beat": 0, "since": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            mine |= {"host": socket.gethostname(), "pid": os.getpid(), **_this_process()}
            self._directory.write_json(LEASE_FILE, mine)
            if not self._directory.is_local:
                time.sleep(SETTLE_S)
            found = self._read()
            if found is None or found["holder"] != self._id:
                raise self._refusal(found or {})
        self._mine = mine
        self._thread = threading.Thread(target=self._keep, name="metadist-lease", daemon=True)
        self._thread.start()

    def guard(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """`stop`, which raises RunDirectoryError once another process has taken the lease."""

        def guarded() -> bool:
            if self._taken_by is not None:
                raise self._refusal(self._taken_by)
            return stop()

        return guarded

    def release(self) -> None:
        """Gives the lease back, where it is still ours."""
        if self._mine is None or self._thread is None:
            return
        self._over.set()
        self._thread.join()
        self._mine = None
        if self._taken_by is None:
            found = self._read()
            if found is not None and found["holder"] == self._id:
                self._directory.delete(LEASE_FILE)

    def _keep(self) -> None:
        told = False
        while not self._over.wait(BEAT_S):
            try:
                self._beat()
                told = False
            except MetadistError as error:
                # The next beat may succeed; training is not stopped for a store that hiccups.
                if not told:
                    self._tell(f"The lease could not be renewed: {error}")
                told = True
            if self._taken_by is not None:
                return

    def _beat(self) -> None:
        assert self._mine is not None
        found = self._read()
        if found is not None and found["holder"] != self._id:
            self._taken_by = found
            return
        self._mine["beat"] += 1
        self._directory.write_json(LEASE_FILE, self._mine)

    def _wait_until_free(self) -> None:
        """Returns once nobody holds the lease. Raises RunDirectoryError where its holder lives."""
        first = found = self._read()
        began, told = time.monotonic(), False
        while found is not None:
            alive = _is_alive(found)
            if alive or found != first:
                raise self._refusal(found)
            if alive is False or time.monotonic() - began > EXPIRES_S:
                self._tell(f"Taking over from {_who(found)}, which is gone.")
                return
            if not told:
                self._tell(
                    f"{self._directory.location} is held by {_who(found)}: waiting {EXPIRES_S:g} s for its beat."
                )
                told = True
            time.sleep(min(BEAT_S, EXPIRES_S) / 10)
            found = self._read()

    def _read(self) -> dict[str, Any] | None:
        """The lease; None where there is none."""
        try:
            found = self._directory.read_json(LEASE_FILE)
        except RunDirectoryError:
            if not self._directory.exists(LEASE_FILE):
                return None
            raise
        if not isinstance(found, dict) or not isinstance(found.get("holder"), str):
            raise RunDirectoryError(
                f"{self._directory.location}/{LEASE_FILE} is damaged, so it cannot be told who trains here."
                " If nobody does, remove that file."
            )
        return found

    def _refusal(self, found: dict[str, Any]) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self._directory.location} is held by {_who(found)}: two processes cannot train in one run directory."
            " Wait for it, stop it, or choose another --run-dir."
        )


def _who(found: dict[str, Any]) -> str:
    return f"process {found.get('pid', '?')} on {found.get('host', '?')} since {found.get('since', '?')}"


def _this_process() -> dict[str, str | None]:
    return {"machine": _machine(), "started": _start_of(os.getpid())}


def _machine() -> str | None:
    """This boot of this kernel and its namespace of processes: within it a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None where there is no such process (a zombie is none)."""
    try:
        # The name before the last bracket may hold spaces; the state follows it, the start is the 20th from there.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(found: dict[str, Any]) -> bool | None:
    """Whether the holder's process lives; None where that cannot be known from here."""
    if found.get("machine") is None or found["machine"] != _machine():
        return None
    return _start_of(int(found["pid"])) == found.get("started")


@contextmanager
def _one_at_a_time(directory: RunDirectory) -> Iterator[None]:
    """On a local disk: newcomers of one machine wait for each other. Ends with the process, however that ends."""
    with ExitStack() as stack:
        if directory.is_local and os.name == "posix":
            import fcntl

            handle = os.open(directory.path, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
