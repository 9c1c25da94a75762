"""The run directory: where everything of one run lies, on a local disk or in an object store."""

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs
from rich.console import Console
from rich.text import Text

from metadist.config_file import dump_yaml
from metadist.errors import RunDirectoryError
from metadist.files import READ_PATIENCE_S, WRITE_PATIENCE_S, open_file_system, parse_json, patiently, reason, writing

T = TypeVar("T")
_MAY_HOLD_LINKS = ("", "checkpoints", "checkpoints/*", "tensorboard", "versions", "versions/*", "versions/*/*")
"""Directories whose entries are read or written."""


def refuse_links_out(path: Path, location: str) -> None:
    """Raises RunDirectoryError where a link in a run directory leads out of it: nobody reads or writes through one."""
    inside = path.resolve()
    for entry in (entry for pattern in _MAY_HOLD_LINKS for entry in path.glob(f"{pattern}/*" if pattern else "*")):
        if entry.is_symlink() and not entry.resolve().is_relative_to(inside):
            raise RunDirectoryError(
                f"{location}/{entry.relative_to(path)} is a link that leads out of the run directory, to"
                f" {entry.resolve()}. Put what it leads to in its place, or choose a run.storage_path with more room."
            )


def _tell_stderr(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(text, "yellow"))


SPEC_FILE = "spec.json"
"""The shapes of the task source's episodes."""


class RunDirectory:
    """One run's files, under names that never change.

    Files that grow or are drawn (metrics, TensorBoard events, pictures) are written under `local`: the
    run directory itself on a local disk, otherwise a temporary directory that `upload` copies from.
    """

    def __init__(self, location: str, notify: Callable[[str], None] | None = None) -> None:
        """`notify` is told of a storage that has to be tried again; left out, stderr is."""
        self.location = location
        self.file_system, self.path = open_file_system(location)
        self.is_local = isinstance(self.file_system, fs.LocalFileSystem)
        self._notify = notify or _tell_stderr
        if self.is_local:
            refuse_links_out(Path(self.path), location)
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self.local = Path(self.path) if self.is_local else Path(tempfile.mkdtemp(prefix="metadist-"))

    def create(self) -> None:
        """Makes the directory. Raises RunDirectoryError where that is impossible."""
        try:
            self._change("checkpoints", lambda path: self.file_system.create_dir(path, recursive=True))
        except OSError as error:
            raise RunDirectoryError(
                f"{self.location}: the run directory cannot be made ({reason(error)}). Choose another --run-dir."
            ) from None

    def exists(self, name: str) -> bool:
        info = self._read(name, self.file_system.get_file_info)
        return bool(info.type != fs.FileType.NotFound)

    def size(self, name: str) -> int:
        """A file's bytes; 0 where it is missing or no file."""
        return int(self._read(name, self.file_system.get_file_info).size or 0)

    def names(self, name: str) -> list[str]:
        """What lies in a directory; nothing where it is not there."""
        found = self._read(
            name, lambda path: self.file_system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        )
        return [info.base_name for info in found]

    def read(self, name: str) -> bytes:
        """A file's content. Raises RunDirectoryError where it is missing."""

        def content(path: str) -> bytes:
            with self.file_system.open_input_stream(path) as stream:
                return bytes(stream.read())

        return self._read(name, content)

    def _read(self, name: str, operation: Callable[[str], T]) -> T:
        try:
            return self._patiently(name, operation, READ_PATIENCE_S)
        except OSError as error:
            raise RunDirectoryError(
                f"{self.location}/{name}: not readable ({reason(error)}). Is this a run directory of metadist?"
            ) from None

    def make(self, name: str) -> None:
        """Makes a directory within this one. Raises MetadistError."""
        with writing(f"{self.location}/{name}"):
            self._change(name, lambda path: self.file_system.create_dir(path, recursive=True))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all, where the file system can rename. Raises MetadistError."""
        with writing(f"{self.location}/{name}"):
            self._change(name, lambda path: self._write_whole(path, content))

    def _write_whole(self, target: str, content: bytes) -> None:
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

    def remove(self, name: str, first: str) -> None:
        """Removes a directory with all in it, one of its files before the others. Raises MetadistError."""

        def remove(path: str) -> None:
            # It may be gone already, where the storage failed only to say so.
            with suppress(FileNotFoundError):
                self.file_system.delete_file(f"{path}/{first}")
            with suppress(FileNotFoundError):
                self.file_system.delete_dir(path)

        with writing(f"{self.location}/{name}"):
            self._change(name, remove)

    def _change(self, name: str, operation: Callable[[str], T]) -> T:
        return self._patiently(name, operation, WRITE_PATIENCE_S)

    def _patiently(self, name: str, operation: Callable[[str], T], patience_s: float) -> T:
        place = f"{self.location}/{name}"
        return patiently(lambda: operation(f"{self.path}/{name}"), place, self._notify, self.is_local, patience_s)

    def read_json(self, name: str) -> Any:
        """A JSON file's value. Raises RunDirectoryError where it is missing or torn."""
        try:
            return parse_json(self.read(name))
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
        """Copies what has changed under `local` into the run directory, where that is not the same place."""
        if self.is_local:
            return
        for path in sorted(path for path in self.local.rglob("*") if path.is_file()):
            name, status = path.relative_to(self.local), path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if self._uploaded.get(name) == stamp:
                continue
            if name.parent != Path() and not any(other.parent == name.parent for other in self._uploaded):
                self.make(name.parent.as_posix())
            self.write(name.as_posix(), path.read_bytes())
            self._uploaded[name] = stamp

    def close(self) -> None:
        """Uploads a last time and removes the temporary directory."""
        if not self.is_local:
            self.upload()
            shutil.rmtree(self.local)
