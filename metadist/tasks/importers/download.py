"""Downloads over HTTP(S): they resume, retry, and show up under their name only once their checksum fits."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from metadist.errors import DataError

Progress = Callable[[str, int, int | None], None]
"""Is told what is being done, how much of it is done, and the total where that is known."""

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
