import ctypes
import subprocess
import sys

import pytest

CODE = """
import ctypes, torch
from metadist.core.memory import keep_freed_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]  # glibc's malloc.h

malloc = ctypes.CDLL(None)
malloc.mallinfo2.restype = Info

def taken_and_kept():
    idle = malloc.mallinfo2()
    tensor = torch.zeros(10_000_000)  # 40 MB, more than glibc keeps by itself
    mapped = malloc.mallinfo2().hblks - idle.hblks
    del tensor
    return mapped, malloc.mallinfo2().fordblks >= 40_000_000

before = taken_and_kept()
keep_freed_memory()
print(before, taken_and_kept())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33, which tells what it holds")
def test_large_tensors_are_mapped_and_given_back_before_and_kept_after():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, False) (0, True)"
