import hashlib
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from metadist.errors import DataError
from metadist.tasks.importers import download as module
from metadist.tasks.importers.download import download

BODY = bytes(range(256)) * 1000
MD5 = f"md5:{hashlib.md5(BODY).hexdigest()}"
HALF = len(BODY) // 2


class Server(ThreadingHTTPServer):
    """Answers request n in the n-th way of `script`, and every further one in the last way."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.ranges = []
        """The Range header of each request."""
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/some/file.zip"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        way = server.script[min(len(server.ranges), len(server.script) - 1)]
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if isinstance(way, int):
            self.send_error(way)
        elif way == "hang":
            server.closing.wait(10)
        elif start >= len(BODY):
            self.send_error(416)
        elif way == "no range":
            self.answer(200, 0, BODY)
        elif way == "no length":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(BODY)
        elif way == "wrong range":
            self.answer(206, start + 1, BODY[start + 1 :])
        else:
            stop = {"whole": len(BODY), "cut": (start + len(BODY)) // 2, "stall": (start + len(BODY)) // 2}[way]
            self.answer(206 if wanted else 200, start, BODY[start:], sent=stop - start)
            if way == "stall":
                server.closing.wait(10)

    def answer(self, status, start, body, sent=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.end_headers()
        self.wfile.write(body[:sent])


@contextmanager
def serving(*script):
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(server, path, **options):
    return download(server.url, path, **{"checksum": MD5, "backoff_s": 0.001, "timeout_s": 5.0} | options)


def test_a_file_arrives_whole_and_its_progress_reaches_the_total(tmp_path):
    seen = []
    with serving("whole") as server:
        path = fetch(server, tmp_path / "cache" / "file.zip", progress=lambda *state: seen.append(state))
    assert path == tmp_path / "cache" / "file.zip"
    assert path.read_bytes() == BODY
    assert [file.name for file in path.parent.iterdir()] == ["file.zip"]
    assert server.ranges == [None]
    assert seen[-1] == ("file.zip", len(BODY), len(BODY))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


def test_a_cut_download_goes_on_where_it_was_cut(tmp_path):
    seen = []
    with serving("cut", "cut", "whole") as server:
        path = fetch(server, tmp_path / "file.zip", progress=lambda *state: seen.append(state))
    assert path.read_bytes() == BODY
    # the server sends half of what is missing, then half of the rest
    assert server.ranges == [None, f"bytes={HALF}-", f"bytes={HALF + HALF // 2}-"]
    assert {total for _, _, total in seen} == {len(BODY)}
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


def test_a_stalled_download_goes_on_where_it_stalled(tmp_path):
    with serving("stall", "whole") as server:
        assert fetch(server, tmp_path / "file.zip", timeout_s=0.15).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_a_later_call_goes_on_from_what_an_earlier_one_left(tmp_path):
    with serving("cut", 404, "whole") as server:
        with pytest.raises(DataError, match="404"):
            fetch(server, tmp_path / "file.zip")
        assert not (tmp_path / "file.zip").exists()
        assert (tmp_path / "file.zip.partial").read_bytes() == BODY[:HALF]
        assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY
    assert server.ranges == [None, f"bytes={HALF}-", f"bytes={HALF}-"]


@pytest.mark.parametrize("answer", ["no range", "no length"])
def test_a_server_that_ignores_ranges_makes_it_start_again(tmp_path, answer):
    with serving("cut", answer) as server:
        assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY
    assert server.ranges == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("checksum", [MD5, None])
def test_a_server_that_sends_another_range_makes_it_start_again(tmp_path, checksum):
    with serving("cut", "wrong range", "whole") as server:
        assert fetch(server, tmp_path / "file.zip", checksum=checksum).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize("length", [len(BODY), len(BODY) + 5])
def test_a_part_that_is_as_long_as_the_file_makes_it_start_again(tmp_path, length):
    (tmp_path / "file.zip.partial").write_bytes(bytes(length))
    with serving("whole") as server:
        assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY
    assert server.ranges == [f"bytes={length}-", None]


def test_a_part_of_another_file_is_dropped_when_the_checksum_shows_it(tmp_path):
    (tmp_path / "file.zip.partial").write_bytes(bytes(HALF))
    with serving("whole") as server:
        assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY
    assert server.ranges == [f"bytes={HALF}-", None]


def test_a_part_is_not_trusted_where_no_checksum_can_show_what_it_is(tmp_path):
    (tmp_path / "file.zip.partial").write_bytes(bytes(HALF))
    with serving("whole") as server:
        assert fetch(server, tmp_path / "file.zip", checksum=None).read_bytes() == BODY
    assert server.ranges == [None]


def test_a_wrong_checksum_is_an_error_at_once_and_leaves_no_file(tmp_path):
    wanted = f"sha256:{'0' * 64}"
    with serving("whole") as server, pytest.raises(DataError) as caught:
        fetch(server, tmp_path / "file.zip", checksum=wanted)
    assert str(caught.value) == (
        f"{server.url}: cannot be downloaded after 1 attempt(s): the checksum must be {wanted},"
        f" got sha256:{hashlib.sha256(BODY).hexdigest()}. Download it by hand and give its directory as --source."
    )
    assert len(server.ranges) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_not_tried_again(tmp_path, status):
    with (
        serving(status) as server,
        pytest.raises(DataError, match=rf"1 attempt\(s\): the server answers {status} ") as caught,
    ):
        fetch(server, tmp_path / "file.zip")
    assert server.url in str(caught.value)
    assert "--source" in str(caught.value)
    assert len(server.ranges) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_tried_again(tmp_path, status):
    with serving(status, status, "whole") as server:
        assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY
    assert len(server.ranges) == 3


def test_a_server_that_says_nothing_is_given_up_after_the_timeout(tmp_path):
    start = time.monotonic()
    with serving("hang") as server:
        with pytest.raises(DataError, match=r"2 attempt\(s\): the server sent nothing for 0.1 s"):
            fetch(server, tmp_path / "file.zip", timeout_s=0.1, attempts=2)
        assert time.monotonic() - start < 4  # two waits of 0.1 s; the server would have hung for 10 s
    assert len(server.ranges) == 2


def test_pauses_double_while_no_server_is_there(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    with serving("whole") as server:
        pass
    with pytest.raises(DataError, match=r"4 attempt\(s\): .*refused"):
        download(server.url, tmp_path / "file.zip", attempts=4, backoff_s=1.0)
    assert pauses == [1.0, 2.0, 4.0]


def test_a_file_that_is_there_already_is_not_downloaded(tmp_path):
    (tmp_path / "file.zip").write_bytes(BODY)
    with serving(500) as server:
        assert fetch(server, tmp_path / "file.zip") == tmp_path / "file.zip"
    assert server.ranges == []


def test_a_file_that_is_there_with_another_checksum_is_replaced(tmp_path):
    (tmp_path / "file.zip").write_bytes(BODY[:-1])
    with serving("whole") as server:
        assert fetch(server, tmp_path / "file.zip").read_bytes() == BODY
    assert server.ranges == [None]


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "cache").write_text("a file, not a directory")
    with serving("whole") as server, pytest.raises(DataError, match=r"cache/file\.zip\.partial: cannot be written"):
        fetch(server, tmp_path / "cache" / "file.zip")
    assert server.ranges == []


def test_an_address_that_is_none_is_not_tried_again(tmp_path):
    with pytest.raises(DataError, match=r"^file\.zip: cannot be downloaded after 1 attempt"):
        download("file.zip", tmp_path / "file.zip")
