"""A storage without renames, as object stores are, that fails on purpose and comes back."""

import pyarrow as pa
from pyarrow import fs


class FlakyStorage(fs.FileSystemHandler):
    """Local files; each operation asks `fails` first, and raises what an object store raises where it says so."""

    def __init__(self, fails):
        self.local, self.fails = fs.LocalFileSystem(), fails

    def _try(self, what):
        if self.fails(what):
            raise OSError("When uploading part: AWS Error NETWORK_CONNECTION during PutObject operation")

    def create_dir(self, path, recursive):
        self._try("create_dir")
        self.local.create_dir(path, recursive=recursive)

    def open_output_stream(self, path, metadata):
        self._try("write")
        return pa.PythonFile(_Stream(self.local.open_output_stream(path), self._try), mode="w")

    def delete_file(self, path):
        self._try("delete_file")
        self.local.delete_file(path)

    def delete_dir(self, path):
        self._try("delete_dir")
        self.local.delete_dir(path)
        self._try("answer")

    def get_file_info(self, paths):
        self._try("get_file_info")
        return self.local.get_file_info(paths)

    def get_file_info_selector(self, selector):
        self._try("list")
        return self.local.get_file_info(selector)

    def open_input_stream(self, path):
        self._try("read")
        return pa.PythonFile(self.local.open_input_stream(path), mode="r")

    def get_type_name(self):
        return "flaky"

    def normalize_path(self, path):
        return path

    def _not_used(self, *arguments):
        raise NotImplementedError

    copy_file = open_append_stream = open_input_file = move = _not_used
    delete_dir_contents = delete_root_dir_contents = _not_used


class _Stream:
    def __init__(self, stream, attempt):
        self.stream, self.attempt, self.closed = stream, attempt, False

    def write(self, content):
        half = len(content) // 2
        self.stream.write(bytes(content)[:half])
        self.attempt("half a write")
        self.stream.write(bytes(content)[half:])

    def flush(self):
        self.stream.flush()

    def close(self):
        self.closed = True
        self.stream.close()
