"""Paths and URIs as pyarrow file systems: local directories, s3://, gs:// and the others it knows."""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from metadist.errors import MetadistError, UserError

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Between tries; each wait is twice the one before."""
WRITE_PATIENCE_S, READ_PATIENCE_S = 300.0, 30.0

_SECRETS = ("key", "secret", "token", "password")
_PASSING = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH}
_PASSING |= {errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EPIPE}
_FINAL_ANSWERS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_", "SIGNATURE", "Unauthorized", "Forbidden", "Not Found")
"""Of object stores, which give no number."""


def patiently(
    operation: Callable[[], T], place: str, notify: Callable[[str], None], is_local: bool, patience_s: float
) -> T:
    """What a storage refuses for a moment is tried again, with longer and longer waits, and told.

    Raises the last OSError once patience is at its end, and at once one that time does not heal: a full disk, no
    permission, a missing file. Of a local file system only the errors of networks and of devices are thought to pass.
    """
    waited, wait = 0.0, FIRST_WAIT_S
    while True:
        try:
            value = operation()
        except OSError as error:
            if waited >= patience_s or not _may_pass(error, is_local):
                raise
            notify(f"{place}: {reason(error)}. Trying again in {wait:g} s.")
            time.sleep(wait)
            waited += wait
            wait = min(2 * wait, LONGEST_WAIT_S)
        else:
            if waited:
                notify(f"{place}: it is there again, after {waited:g} s.")
            return value


def _may_pass(error: OSError, is_local: bool) -> bool:
    if error.errno:
        return error.errno in _PASSING
    of_another_kind = type(error) is not OSError and not isinstance(error, ConnectionError | TimeoutError)
    return not (is_local or of_another_kind or any(answer in str(error) for answer in _FINAL_ANSWERS))


def open_file_system(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or a URI, and the path within it. Raises UserError where a secret is in it."""
    if "://" not in location:
        try:
            return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
        except RuntimeError:
            raise UserError(f"{location}: there is no such user's home directory. Write the path in full.") from None
    parts = urlsplit(location)
    if parts.username or parts.password or any(word in parts.query.lower() for word in _SECRETS):
        raise UserError(
            f"{parts.scheme}://...{parts.path}: a place must not hold a user, a password or a key, since it is written"
            " into config.yaml and logs. Give them as the environment variables of the object store (AWS_PROFILE,"
            " GOOGLE_APPLICATION_CREDENTIALS)."
        )
    try:
        return fs.FileSystem.from_uri(location)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{location}: not a place that can be opened ({error}). Use a local path, s3://BUCKET/... or gs://BUCKET/..."
        ) from error


@contextmanager
def writing(place: str) -> Iterator[None]:
    """Raises MetadistError, naming `place`, where something cannot be written: a full disk, no permission."""
    try:
        yield
    except OSError as error:
        raise MetadistError(
            f"{place}: could not be written ({reason(error)}). Free space or correct permissions,"
            " then run the same command again: it goes on from the last checkpoint."
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file beside `path` to write to; it takes `path`'s place once it is whole. Raises MetadistError."""
    partial = path.with_name(f"{path.name}.partial")
    with writing(str(path)):
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """What the operating system or the object store says, in one line."""
    return os.strerror(error.errno) if error.errno else (str(error).splitlines() or [type(error).__name__])[0]


def parse_json(content: str | bytes) -> Any:
    """The value of JSON that was read back. Raises ValueError for any other content, however deep it is nested."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None
