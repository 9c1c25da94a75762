"""Who may use a cluster: tokens of those that we start, and no use of open ones that are not on this machine."""

import ipaddress
import os
import secrets
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from metadist.errors import ClusterError

INSECURE_VARIABLE = "METADIST_INSECURE"
"""Set to 1, as `--insecure` does, open clusters elsewhere are used."""
TIMEOUT_S = 10.0
_PING = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Asks a head whether it is alive; the answer does not matter, only whether it is given without a token."""


def token_file() -> Path:
    """Where Ray looks for its token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def make_token() -> None:
    """A token for a local Ray, which asks for one unless RAY_AUTH_MODE says otherwise; its file is its owner's alone.

    Ray would make the file itself, readable by everybody.
    """
    place = token_file()
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    if place.exists():
        if place.stat().st_uid == os.getuid():
            place.chmod(0o600)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def refuse_open_head(address: str) -> None:
    """Raises ClusterError where a head elsewhere (HOST:PORT) takes orders from anybody."""
    host = address.rpartition(":")[0].strip("[]")
    if host and not is_this_machine(host) and lets_anybody_in(address):
        _refuse(address)


def refuse_open_dashboard(address: str) -> None:
    """Likewise for the URL of a dashboard, which runs jobs."""
    if is_this_machine(urlsplit(address).hostname or ""):
        return
    try:
        # A request of our own: Ray's client would send the token along.
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=TIMEOUT_S).close()
    except (urllib.error.URLError, OSError):
        return  # Refused, or not to be reached: whoever uses it next says so.
    _refuse(address)


def lets_anybody_in(address: str) -> bool:
    """Whether a head answers a caller without a token. False where nobody answers at all."""
    with grpc.insecure_channel(address) as channel:
        ping = channel.unary_unary(_PING, request_serializer=bytes, response_deserializer=bytes)
        try:
            ping(b"", timeout=TIMEOUT_S)
        except grpc.RpcError:
            return False
    return True


def is_this_machine(host: str) -> bool:
    """Whether a host's name or number is that of the loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse(address: str) -> None:
    if os.environ.get(INSECURE_VARIABLE) == "1":
        return
    raise ClusterError(
        f"{address} is not on this machine and asks for no token: whoever reaches it can run code there, and see what"
        " you send. Start that cluster with RAY_AUTH_MODE=token, or go on all the same with --insecure."
    )
