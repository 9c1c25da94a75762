"""Where importers get their files: downloads over HTTP(S), directories, and zip archives.

A download resumes, retries, and shows up under its name only once its checksum fits.
"""

import hashlib
import os
import re
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from metadist.errors import DataError

Progress = Callable[[str, int, int | None], None]
"""Is told what is being done, how much of it is done, and the total where that is known."""

MAX_MEMBER_BYTES = 64 * 2**20
"""Larger files are refused: an image of a few-shot pool has kilobytes."""
BLOCK_BYTES = 1 << 16
TRY_AGAIN_STATUSES = (408, 416, 425, 429, 500, 502, 503, 504)


def no_progress(what: str, done: int, total: int | None) -> None:
    """For callers that show nothing."""


class _Failure(Exception):
    """One attempt failed; `again` where another may do better."""

    def __init__(self, reason: str, *, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


def download(
    url: str,
    path: Path,
    *,
    checksum: str | None = None,
    progress: Progress = no_progress,
    timeout_s: float = 30.0,
    attempts: int = 4,
    backoff_s: float = 1.0,
    remedy: str = "Download it by hand and give its directory as --source.",
) -> Path:
    """Brings `url` to `path`, unless a file with that checksum is there already.

    `checksum` is written `md5:HEX` or `sha256:HEX`. Until it fits, the bytes lie in `path.partial`,
    from which a later attempt goes on; without a checksum nothing proves that the old part belongs
    to the same file, so only attempts of one call go on from each other. `timeout_s` bounds each
    wait for the server, and the pause before attempt n + 1 is `backoff_s * 2**(n - 1)`.
    """
    if path.is_file() and (checksum is None or _digest(path, checksum) == checksum):
        return path
    partial = path.with_name(path.name + ".partial")
    reason = "no attempt was made"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if checksum is None:
            partial.unlink(missing_ok=True)
        for attempt in range(attempts):
            if attempt:
                time.sleep(backoff_s * 2 ** (attempt - 1))
            try:
                _fetch(url, partial, checksum, progress, timeout_s)
            except _Failure as failure:
                reason = str(failure)
                if failure.again:
                    continue
                break
            return partial.replace(path)
    except OSError as error:
        raise DataError(
            f"{partial}: cannot be written ({error}). Make room or permit it, or choose another cache."
        ) from error
    raise DataError(f"{url}: cannot be downloaded after {attempt + 1} attempt(s): {reason}. {remedy}")


def _fetch(url: str, partial: Path, checksum: str | None, progress: Progress, timeout_s: float) -> None:
    """One attempt; afterwards `partial` is whole and right, or holds what a further attempt can use."""
    start = partial.stat().st_size if partial.exists() else 0
    with _open(url, start, partial, timeout_s) as response:
        resumed = response.status == 206
        done = start if resumed else 0
        total = None if response.length is None else done + response.length
        with partial.open("ab" if resumed else "wb") as file:
            for block in _blocks(response, timeout_s):
                file.write(block)
                done += len(block)
                progress(url.rsplit("/", 1)[-1], done, total)
    if total is not None and done < total:
        raise _Failure(f"the connection was cut after {done} of {total} bytes")
    if checksum is not None and (found := _digest(partial, checksum)) != checksum:
        partial.unlink()
        # A part of an older file spoils the whole; a file that came in one piece will not change.
        raise _Failure(f"the checksum must be {checksum}, got {found}", again=resumed)


def _open(url: str, start: int, partial: Path, timeout_s: float) -> HTTPResponse:
    """The answer: 200 with the whole file, or 206 with what follows the first `start` bytes."""
    headers = {"User-Agent": "metadist"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=timeout_s)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # the part is as long as the file, or longer
            partial.unlink(missing_ok=True)
        reason = f"the server answers {error.code} {error.reason}"
        raise _Failure(reason, again=error.code in TRY_AGAIN_STATUSES) from error
    except ValueError as error:
        raise _Failure(str(error), again=False) from error
    except (OSError, HTTPException) as error:
        raise _Failure(_describe(error, timeout_s)) from error
    if response.status == 206:
        sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if sent is None or int(sent[1]) != start:
            response.close()
            partial.unlink(missing_ok=True)
            raise _Failure(f"the server sent another range than bytes {start}-")
    return response


def _blocks(response: HTTPResponse, timeout_s: float) -> Iterator[bytes]:
    while True:
        try:
            block = response.read1(BLOCK_BYTES)
        except (OSError, HTTPException) as error:
            raise _Failure(_describe(error, timeout_s)) from error
        if not block:
            return
        yield block


def _describe(error: Exception, timeout_s: float) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return f"the server sent nothing for {timeout_s:g} s"
    return str(cause) or type(cause).__name__


def _digest(path: Path, checksum: str) -> str:
    """The checksum of a file, by the algorithm of `checksum` and written like it."""
    algorithm = checksum.partition(":")[0]
    state = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return f"{algorithm}:{state.hexdigest()}"


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
