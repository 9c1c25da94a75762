"""The files of a directory or of a zip archive, read the same way."""

import hashlib
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from metadist.errors import DataError

MAX_MEMBER_BYTES = 64 * 2**20
"""Larger files are refused: an image of a few-shot pool has kilobytes."""


class FileTree:
    """The files of a directory or of a zip archive, by their relative POSIX names in sorted order.

    Hidden files and `__MACOSX` are left out. In an archive, a member whose name leads outside of it, or
    that is larger than MAX_MEMBER_BYTES, is an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        if path.is_dir():
            names = list(_walk(path))
        elif path.is_file():
            names = self._open_archive()
        else:
            raise DataError(f"{path}: no such directory or zip archive. Correct --source.")
        self.names = sorted(name for name in names if not _is_hidden(name))

    def __enter__(self) -> "FileTree":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._archive:
            self._archive.close()

    @property
    def is_archive(self) -> bool:
        return self._archive is not None

    def _open_archive(self) -> list[str]:
        try:
            self._archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile, RuntimeError, ValueError) as error:
            raise DataError(
                f"{self.path}: not a readable zip archive ({error}). Copy it again, or name a directory."
            ) from error
        names = []
        for member in self._archive.infolist():
            if member.is_dir():
                continue
            parts = re.split(r"[/\\]", member.filename)
            if ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", parts[0]):
                raise DataError(
                    f"{self.path}: member {member.filename!r} leads outside of the archive."
                    " Do not trust this file; get it from where it was first published."
                )
            if member.file_size > MAX_MEMBER_BYTES:
                raise DataError(
                    f"{self.path}: member {member.filename!r} has {member.file_size} bytes, more than"
                    f" {MAX_MEMBER_BYTES}. Scale that image down, or leave it out."
                )
            names.append(member.filename)
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise DataError(f"{self.path}: holds {some(twice)} more than once. Pack the archive again.")
        return names

    def where(self, name: str) -> str:
        """A file's name for messages."""
        return f"{self.path}: {name}" if self._archive else str(self.path / name)

    def read(self, name: str) -> bytes:
        try:
            if self._archive:
                return self._archive.read(name)
            file = self.path / name
            if file.stat().st_size > MAX_MEMBER_BYTES:
                raise DataError(
                    f"{file}: has {file.stat().st_size} bytes, more than {MAX_MEMBER_BYTES}."
                    " Scale that image down, or leave it out."
                )
            return file.read_bytes()
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            # RuntimeError: the member is encrypted, or NotImplementedError: packed in an unknown way
            raise DataError(f"{self.where(name)}: cannot be read ({error}). Copy or unpack it again.") from error

    def content_digest(self, names: Mapping[str, str]) -> str:
        """Sha256 over `name + "\\0" + sha256hex(bytes) + "\\n"` of files sorted by name; `names` gives the
        name of each as it is hashed, and the file that holds it."""
        digest = hashlib.sha256()
        for hashed_name in sorted(names):
            digest.update(f"{hashed_name}\0{hashlib.sha256(self.read(names[hashed_name])).hexdigest()}\n".encode())
        return digest.hexdigest()


def _walk(root: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}). Permit it.") from error

    for directory, inner, files in os.walk(root, onerror=fail, followlinks=True):
        here = Path(directory)
        ancestors = [here.resolve(), *here.resolve().parents]
        inner[:] = sorted(name for name in inner if (here / name).resolve() not in ancestors)
        for name in files:
            yield (here / name).relative_to(root).as_posix()


def _is_hidden(name: str) -> bool:
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more
