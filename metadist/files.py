"""Paths and URIs as pyarrow file systems: local directories, s3://, gs:// and the others it knows."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from metadist.errors import MetadistError, UserError


def open_file_system(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or a URI, and the path within it."""
    if "://" not in location:
        try:
            return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
        except RuntimeError:
            raise UserError(f"{location}: there is no such user's home directory. Write the path in full.") from None
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
