"""The run directory: where everything of one run lies, on a local disk or in an object store."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pyarrow import fs

from metadist.config_file import dump_yaml
from metadist.errors import MetadistError, RunDirectoryError
from metadist.files import open_file_system


class RunDirectory:
    """One run's files, under names that never change.

    Files that grow or are drawn (metrics, TensorBoard events, pictures) are written under `local`: the
    run directory itself on a local disk, otherwise a temporary directory that `upload` copies from.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.file_system, self.path = open_file_system(location)
        self.is_local = isinstance(self.file_system, fs.LocalFileSystem)
        self.local = Path(self.path) if self.is_local else Path(tempfile.mkdtemp(prefix="metadist-"))

    def create(self) -> None:
        """Makes the directory. Raises RunDirectoryError where that is impossible."""
        try:
            self.file_system.create_dir(f"{self.path}/checkpoints", recursive=True)
        except OSError as error:
            raise RunDirectoryError(
                f"{self.location}: the run directory cannot be made ({_reason(error)}). Choose another --run-dir."
            ) from None

    def exists(self, name: str) -> bool:
        info = self.file_system.get_file_info(f"{self.path}/{name}")
        return bool(info.type != fs.FileType.NotFound)

    def read(self, name: str) -> bytes:
        """A file's content. Raises RunDirectoryError where it is missing."""
        try:
            with self.file_system.open_input_stream(f"{self.path}/{name}") as stream:
                return bytes(stream.read())
        except OSError as error:
            raise RunDirectoryError(
                f"{self.location}/{name}: not readable ({_reason(error)}). Is this a run directory of metadist?"
            ) from None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all, where the file system can rename. Raises MetadistError."""
        target = f"{self.path}/{name}"
        try:
            if not self.is_local:
                self._write(target, content)
                return
            self._write(f"{target}.partial", content)
            self.file_system.move(f"{target}.partial", target)
        except OSError as error:
            raise MetadistError(
                f"{self.location}/{name}: could not be written ({_reason(error)}). Free space or correct permissions,"
                " then run the same command again: it goes on from the last checkpoint."
            ) from None

    def _write(self, target: str, content: bytes) -> None:
        with self.file_system.open_output_stream(target) as stream:
            stream.write(content)

    def read_json(self, name: str) -> Any:
        """A JSON file's value. Raises RunDirectoryError where it is missing or torn."""
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise RunDirectoryError(
                f"{self.location}/{name}: not valid JSON ({error}). Restore the file or start another run directory."
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def write_yaml(self, name: str, value: Any) -> None:
        self.write(name, dump_yaml(value).encode())

    def upload(self) -> None:
        """Copies what lies under `local` into the run directory, where that is not the same place."""
        if not self.is_local:
            fs.copy_files(str(self.local), self.path, destination_filesystem=self.file_system)

    def close(self) -> None:
        """Uploads a last time and removes the temporary directory."""
        if not self.is_local:
            self.upload()
            shutil.rmtree(self.local)


def _reason(error: OSError) -> str:
    return error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
