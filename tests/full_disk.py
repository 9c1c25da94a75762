"""A file system that fails on purpose."""

import errno
import os

import pyarrow as pa
from pyarrow import fs


class FullDisk(fs.FileSystemHandler):
    """A local file system on which only so many more operations succeed; a failing write leaves half of it behind.

    It fails as a full one, or with another `error`: one that is read-only from then on, say.
    """

    def __init__(self, operations, error=errno.ENOSPC):
        self.local, self.left, self.error = fs.LocalFileSystem(), operations, error

    def spend(self):
        if self.left == 0:
            raise OSError(self.error, os.strerror(self.error))
        self.left -= 1

    def create_dir(self, path, recursive):
        self.spend()
        self.local.create_dir(path, recursive=recursive)

    def open_output_stream(self, path, metadata):
        self.spend()
        return pa.PythonFile(_Stream(self.local.open_output_stream(path), self.spend), mode="w")

    def move(self, src, dest):
        self.spend()
        self.local.move(src, dest)

    def delete_file(self, path):
        self.spend()
        self.local.delete_file(path)

    def delete_dir(self, path):
        self.spend()
        self.local.delete_dir(path)

    def get_file_info(self, paths):
        return self.local.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return self.local.get_file_info(selector)

    def open_input_stream(self, path):
        return self.local.open_input_stream(path)

    def _not_used(self, *arguments):
        raise NotImplementedError

    get_type_name = normalize_path = copy_file = open_append_stream = open_input_file = _not_used
    delete_dir_contents = delete_root_dir_contents = _not_used


class _Stream:
    def __init__(self, stream, spend):
        self.stream, self.spend, self.closed = stream, spend, False

    def write(self, content):
        try:
            self.spend()
        except OSError:
            self.stream.write(bytes(content)[: len(content) // 2])
            raise
        self.stream.write(content)

    def flush(self):
        self.stream.flush()

    def close(self):
        self.closed = True
        self.stream.close()
