"""A lease on a run directory: who trains there, with a heartbeat, so that a second process is refused.

Promised, as long as no process is held up for longer than SETTLE_S between reading the lease and writing
it: of several processes that want one run directory, one gets it. A process that is held up longer than
that, or suspended for longer than SILENT_S, may find itself beside another holder; one of the two then
raises LeaseLostError at its first step after its next heartbeat, before it writes another checkpoint. Until
then both write the same bits, since a run is a function of its config.

Not promised: that a holder which still computes, but can no longer write its heartbeat, keeps the lease;
that a file system which shows other machines old content for longer than SETTLE_S is of any use.

No two clocks are compared. The process of a holder on this machine is looked up. Of another, the age of its
heartbeat is the difference of two times given by the file system, its own and that of a file written now;
where that says nothing, its counter is watched for SILENT_S of one's own time.

On a local disk a new lease is made by exclusive creation. pyarrow has nothing like that for object stores, so
there, and where a dead holder's lease is taken over, one writes, waits for SETTLE_S, and holds the lease if
one's own is still there (Fischer's algorithm; Lamport 1987, "A fast mutual exclusion algorithm", sec. 2).
"""

import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from pyarrow import fs
from rich.console import Console
from rich.text import Text

from metadist.callbacks import Callback, Status
from metadist.errors import LeaseError, LeaseLostError, MetadistError, RunDirectoryError
from metadist.files import open_file_system, parse_json, reason, writing

LEASE_FILE = "lease.json"
BEAT_S = 5.0
SILENT_S = 60.0
"""A holder whose last heartbeat is this old is dead."""
SETTLE_S = {"local": 0.5, "remote": 3.0}
"""Longer than anybody takes from reading the lease to having written it."""


@dataclass(frozen=True)
class Holder:
    """What the lease file says."""

    id: str
    host: str
    machine: str | None
    """Changes with every boot, and in every container; None where the system does not tell."""
    pid: int
    process: str | None
    """When the process started, in the machine's ticks: process ids are used again."""
    since: str
    beat: int

    @classmethod
    def parse(cls, content: bytes) -> "Holder | None":
        """None where the file is torn or not ours."""
        try:
            holder = cls(**parse_json(content))
        except (ValueError, TypeError):
            return None
        return holder if type(holder.pid) is int and holder.pid > 0 else None

    @property
    def is_here(self) -> bool:
        """Whether its process, if there is one, can be seen from this one."""
        return self.machine is not None and (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def has_ended(self) -> bool:
        """Only of a holder that is here: whether its process is gone."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _process(self.pid) != self.process


class Lease(Callback):
    """Holds the lease on a run directory while it is entered, and beats in a thread of its own.

    Entering raises LeaseError where another process holds it. As a callback it ends a run that has lost it.
    """

    def __init__(self, location: str, console: Console) -> None:
        self._location, self._console = location, console
        self._file = _LeaseFile(location)
        self._own = Holder(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process=_process(os.getpid()),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            beat=0,
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_ended, name="lease", daemon=True)
        self._lost_to: Holder | None = None

    def __enter__(self) -> "Lease":
        self._file.make_directory()
        try:
            self._acquire()
        except BaseException:
            self._release()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._release()

    def on_step(self, step: int, metrics: Mapping[str, float], status: Status) -> None:
        if self._lost_to is not None:
            raise LeaseLostError(
                f"{self._location}: {_named(self._lost_to)} has taken over this run directory, since there was no"
                f" heartbeat of this process for {SILENT_S:g} s. It ends after step {step}; the other one goes on."
            )

    def _acquire(self) -> None:
        if self._file.create(_content(self._own)):
            return
        found = self._file.read()
        if found is not None:
            self._await_its_end(found)
        self._file.replace(_content(self._own))
        time.sleep(self._file.settle_s)
        found = self._file.read()
        holder = Holder.parse(found or b"")
        if holder is None or holder.id != self._own.id:
            raise self._refusal(holder)

    def _await_its_end(self, found: bytes) -> None:
        """Returns where the holder is dead or gives the lease back; raises LeaseError where it lives."""
        holder = Holder.parse(found)
        if holder is not None and holder.is_here:
            if holder.has_ended:
                return
            raise self._refusal(holder)
        # A torn file is of one who is about to write it, or nobody's.
        patience_s = self._file.settle_s if holder is None else SILENT_S
        if self._file.age_s() > patience_s:
            return
        who = "somebody" if holder is None else _named(holder)
        self._console.print(Text(f"{self._location} is held by {who}: looking for a heartbeat", "yellow"))
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            time.sleep(min(self._file.settle_s, BEAT_S / 10))
            now = self._file.read()
            if now is None:
                return
            if now != found:
                raise self._refusal(Holder.parse(now))

    def _refusal(self, holder: Holder | None) -> LeaseError:
        who = "another process" if holder is None else _named(holder)
        stop = "" if holder is None else f" (on {holder.host}: kill {holder.pid})"
        return LeaseError(
            f"{self._location}: {who} trains in this run directory. Wait until it has ended, stop it{stop}, or choose"
            " another --run-dir. After a crash this takes care of itself: run the same command again."
        )

    def _beat_until_ended(self) -> None:
        failing = False
        while not self._ended.wait(BEAT_S) and self._lost_to is None:
            try:
                self._beat()
                failing = False
            except (OSError, MetadistError) as error:
                if not failing:
                    text = reason(error) if isinstance(error, OSError) else str(error)
                    self._console.print(
                        Text(
                            f"The heartbeat of {self._location}/{LEASE_FILE} could not be written ({text}). Training"
                            f" goes on; after {SILENT_S:g} s without it another process may take this run over.",
                            "yellow",
                        )
                    )
                failing = True

    def _beat(self) -> None:
        found = self._file.read()
        holder = Holder.parse(found or b"")
        if holder is not None and holder.id != self._own.id:
            self._lost_to = holder
            return
        self._own = dataclasses.replace(self._own, beat=self._own.beat + 1)
        # A lease that somebody removed may be another's by now.
        if found is not None or not self._file.create(_content(self._own)):
            self._file.replace(_content(self._own))

    def _release(self) -> None:
        try:
            holder = Holder.parse(self._file.read() or b"")
            if holder is not None and holder.id == self._own.id:
                self._file.delete()
            self._file.remove_empty_directory()
        except (OSError, MetadistError) as error:
            self._console.print(Text(f"{self._location}/{LEASE_FILE} could not be removed ({error}).", "yellow"))


class _LeaseFile:
    """The lease file on a local disk or in an object store."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._file_system, self._directory = open_file_system(location)
        self._path = f"{self._directory}/{LEASE_FILE}"
        self._is_local = isinstance(self._file_system, fs.LocalFileSystem)
        self.settle_s = SETTLE_S["local" if self._is_local else "remote"]
        self._made_directory = False

    def make_directory(self) -> None:
        try:
            self._made_directory = self._is_missing(self._directory)
            self._file_system.create_dir(self._directory, recursive=True)
        except OSError as error:
            raise RunDirectoryError(
                f"{self._location}: the run directory cannot be made ({reason(error)}). Choose another --run-dir."
            ) from None

    def remove_empty_directory(self) -> None:
        """Leaves no trace of a run that was refused before it began."""
        if self._made_directory and not self._file_system.get_file_info(fs.FileSelector(self._directory)):
            self._file_system.delete_dir(self._directory)

    def read(self) -> bytes | None:
        """None where there is no lease."""
        try:
            if self._is_missing(self._path):
                return None
            with self._file_system.open_input_stream(self._path) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunDirectoryError(
                f"{self._location}/{LEASE_FILE}: not readable ({reason(error)}). Correct its permissions, or choose"
                " another --run-dir."
            ) from None

    def create(self, content: bytes) -> bool:
        """Makes the file unless it is there; False where it is, or where the file system cannot do that."""
        if not self._is_local:
            return False
        with writing(f"{self._location}/{LEASE_FILE}"):
            try:
                with open(self._path, "xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
        return True

    def replace(self, content: bytes) -> None:
        with writing(f"{self._location}/{LEASE_FILE}"):
            if not self._is_local:
                self._write(self._path, content)
                return
            partial = f"{self._path}.{uuid.uuid4().hex}"
            try:
                self._write(partial, content)
                os.replace(partial, self._path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(partial)

    def delete(self) -> None:
        self._file_system.delete_file(self._path)

    def age_s(self) -> float:
        """Seconds since the last heartbeat, by the file system's own clock; 0 where it does not tell."""
        probe = f"{self._path}.{uuid.uuid4().hex}"
        with writing(self._location):
            self._write(probe, b"what time is it?")
            try:
                now, then = (info.mtime_ns for info in self._file_system.get_file_info([probe, self._path]))
            finally:
                self._file_system.delete_file(probe)
        return (now - then) / 1e9 if now is not None and then is not None else 0.0

    def _write(self, path: str, content: bytes) -> None:
        with self._file_system.open_output_stream(path) as stream:
            stream.write(content)

    def _is_missing(self, path: str) -> bool:
        return bool(self._file_system.get_file_info(path).type == fs.FileType.NotFound)


def _content(holder: Holder) -> bytes:
    return (json.dumps(dataclasses.asdict(holder), indent=2) + "\n").encode()


def _named(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host} (since {holder.since})"


def _machine() -> str | None:
    """Names this boot of this machine and the space of its process ids: containers have one each."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process(pid: int) -> str | None:
    """When a process started; None where there is none, or it has ended and nobody has asked for its status."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may hold anything; after it come the state and the rest (man 5 proc).
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
