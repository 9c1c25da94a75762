"""What `metadist doctor` looks at: versions, devices, memory, Ray; and what to do about what it finds."""

import os
import platform
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from rich.table import Table

from metadist.errors import ClusterError
from metadist.experiment import cxx_compiler

GIB = 2**30
MIN_SHARED_MEMORY = GIB
MIN_DISK = GIB
MIN_VERSIONS = {"torch": (2, 9), "ray": (2, 60), "pyarrow": (15, 0), "pydantic": (2, 7)}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `remedy` is empty where nothing is to be done."""

    name: str
    status: Literal["ok", "note", "wrong"]
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def diagnose(address: str | None) -> list[Finding]:
    """Looks at everything, in the order of the table. Starts no cluster; joins one only where an address is known."""
    checks: list[Callable[[], list[Finding]]] = [_versions, _compiler, _devices, _shared_memory, _disk, _token]
    findings = [finding for check in checks for finding in check()]
    return findings + _cluster(address or os.environ.get("RAY_ADDRESS"))


def table(findings: list[Finding]) -> Table:
    """The findings for people."""
    result = Table(show_edge=False, pad_edge=False)
    for column in ("", "what", "found", "what to do"):
        result.add_column(column, overflow="fold")
    colours = {"ok": "[green]ok", "note": "[yellow]note", "wrong": "[red]wrong"}
    for finding in findings:
        result.add_row(colours[finding.status], finding.name, finding.found, finding.remedy)
    return result


def _versions() -> list[Finding]:
    found = [Finding("Python", "ok", platform.python_version())]
    for package, least in MIN_VERSIONS.items():
        needed = ".".join(map(str, least))
        try:
            text = version(package)
        except PackageNotFoundError:
            found.append(Finding(package, "wrong", "not installed", f"pip install '{package}>={needed}'"))
            continue
        enough = tuple(int(part) for part in text.split("+")[0].split(".")[:2]) >= least
        remedy = "" if enough else f"pip install '{package}>={needed}'"
        found.append(Finding(package, "ok" if enough else "wrong", text, remedy))
    return found


def _compiler() -> list[Finding]:
    compiler = cxx_compiler()
    if compiler:
        return [Finding("C++ compiler", "ok", compiler)]
    remedy = "install g++: models with convolutions train about 2.5 times as fast with it"
    return [Finding("C++ compiler", "note", "none: torch.compile cannot be used on the CPU", remedy)]


def _devices() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [Finding("CPU", "ok", f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            text = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            found.append(Finding(f"GPU {index}", "ok", text))
    else:
        built = torch.version.cuda is not None
        reason = "torch is built for CUDA but sees no device" if built else "torch is built for the CPU"
        remedy = "check the driver with nvidia-smi" if built else "for GPUs, install a CUDA build of torch"
        found.append(Finding("GPU", "note", reason, remedy))
    return found


def _shared_memory() -> list[Finding]:
    place = Path("/dev/shm")
    if not place.exists():
        return [Finding("shared memory", "note", "no /dev/shm: Ray's object store will use the disk")]
    free = shutil.disk_usage(place).free
    if free >= MIN_SHARED_MEMORY:
        return [Finding("shared memory", "ok", f"{free / GIB:.1f} GiB free in {place}")]
    remedy = "in a container, start it with --shm-size=2g or more: class pools and theta lie there"
    return [Finding("shared memory", "wrong", f"{free / GIB:.2f} GiB free in {place}", remedy)]


def _disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    status: Literal["ok", "wrong"] = "ok" if free >= MIN_DISK else "wrong"
    remedy = "" if status == "ok" else "free space, or put run.storage_path elsewhere: checkpoints are written there"
    return [Finding("disk", status, f"{free / GIB:.1f} GiB free in {Path.cwd()}", remedy)]


def _token() -> list[Finding]:
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    if token.exists() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        return [Finding("Ray token", "wrong", f"{token} can be read by other users", f"chmod 600 {token}")]
    if mode.lower() == "disabled":
        found = "RAY_AUTH_MODE is disabled: a local Ray, too, will take orders from whoever reaches this machine"
        return [Finding("Ray token", "note", found, "unset RAY_AUTH_MODE: metadist then has it ask for a token")]
    if not token.exists():
        return [Finding("Ray token", "ok", f"no token file; RAY_AUTH_MODE is {mode}")]
    return [Finding("Ray token", "ok", f"{token}, readable by you alone; RAY_AUTH_MODE is {mode}")]


def _access(head: str) -> Finding:
    """Whether a head asks for a token, and who can reach it."""
    from metadist.distributed.access import is_this_machine, lets_anybody_in

    if not lets_anybody_in(head):
        return Finding("Ray authentication", "ok", f"{head} asks for a token")
    remedy = "start it with RAY_AUTH_MODE=token, or let a firewall close the port"
    if is_this_machine(head.rpartition(":")[0]):
        return Finding("Ray authentication", "note", f"{head} is open to every user of this machine", remedy)
    return Finding("Ray authentication", "wrong", f"{head} is open: whoever reaches it can run code there", remedy)


def _cluster(address: str | None) -> list[Finding]:
    if address is None:
        return [Finding("Ray cluster", "ok", "no address given: `metadist train` starts a local one")]
    import ray
    from rich.console import Console

    from metadist.distributed.cluster import connect
    from metadist.sections import ScalingSettings

    try:
        disconnect = connect(ScalingSettings(num_workers=0, address=address), Console(quiet=True))
    except ClusterError as error:
        message, _, remedy = str(error).partition("). ")
        return [Finding("Ray cluster", "wrong", message + ")" * bool(remedy), remedy)]
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        has = ray.cluster_resources()
        store = has.get("object_store_memory", 0) / GIB
        text = f"{address}: {len(nodes)} nodes, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
        found = [Finding("Ray cluster", "ok", text)]
        status: Literal["ok", "note"] = "ok" if store >= len(nodes) * 0.1 else "note"
        remedy = "" if status == "ok" else "start the nodes with --object-store-memory of 1 GB or more"
        found.append(Finding("object store", status, f"{store:.1f} GiB in all", remedy))
        return [*found, _access(ray.get_runtime_context().gcs_address)]
    finally:
        disconnect()
