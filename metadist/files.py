"""Paths and URIs as pyarrow file systems: local directories, s3://, gs:// and the others it knows."""

from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from metadist.errors import UserError


def open_file_system(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or a URI, and the path within it."""
    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    try:
        return fs.FileSystem.from_uri(location)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{location}: not a place that can be opened ({error}). Use a local path, s3://BUCKET/... or gs://BUCKET/..."
        ) from error
