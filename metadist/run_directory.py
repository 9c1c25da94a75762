"""The run directory: where everything of one run lies, on a local disk or in an object store."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyarrow import fs

from metadist.config_file import dump_yaml
from metadist.errors import RunDirectoryError
from metadist.files import open_file_system, reason, writing

SPEC_FILE = "spec.json"
"""The shapes of the task source's episodes."""


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
                f"{self.location}: the run directory cannot be made ({reason(error)}). Choose another --run-dir."
            ) from None

    def exists(self, name: str) -> bool:
        with self._reading(name):
            info = self.file_system.get_file_info(f"{self.path}/{name}")
        return bool(info.type != fs.FileType.NotFound)

    def names(self, name: str) -> list[str]:
        """What lies in a directory; nothing where it is not there."""
        with self._reading(name):
            found = self.file_system.get_file_info(fs.FileSelector(f"{self.path}/{name}", allow_not_found=True))
        return [info.base_name for info in found]

    def read(self, name: str) -> bytes:
        """A file's content. Raises RunDirectoryError where it is missing."""
        with self._reading(name), self.file_system.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"{self.location}/{name}: not readable ({reason(error)}). Is this a run directory of metadist?"
            ) from None

    def make(self, name: str) -> None:
        """Makes a directory within this one. Raises MetadistError."""
        with writing(f"{self.location}/{name}"):
            self.file_system.create_dir(f"{self.path}/{name}", recursive=True)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all, where the file system can rename. Raises MetadistError."""
        target = f"{self.path}/{name}"
        with writing(f"{self.location}/{name}"):
            if not self.is_local:
                self._write(target, content)
                return
            partial = f"{target}.partial"
            try:
                self._write(partial, content)
                self.file_system.move(partial, target)
            except OSError:
                with suppress(OSError):
                    self.file_system.delete_file(partial)
                raise

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

    def fetch(self, name: str) -> None:
        """Brings a file of an earlier session under `local`, where that is not the same place."""
        if not self.is_local and self.exists(name):
            (self.local / name).write_bytes(self.read(name))

    def upload(self) -> None:
        """Copies what lies under `local` into the run directory, where that is not the same place."""
        if not self.is_local:
            with writing(self.location):
                fs.copy_files(str(self.local), self.path, destination_filesystem=self.file_system)

    def close(self) -> None:
        """Uploads a last time and removes the temporary directory."""
        if not self.is_local:
            self.upload()
            shutil.rmtree(self.local)
