import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from metadist.core.memory import keep_freed_memory

def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        # 40 MB, more than glibc ever keeps by itself.
        torch.zeros(10_000_000).add_(1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls

torch.set_num_threads(1)
before = faults(3)
keep_freed_memory()
faults(1)
print(before, faults(3))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_memory_is_given_back_to_the_system_before_and_kept_after():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    # Pages are of 4 KB, or of 2 MB where the system makes huge ones.
    assert before >= 19
    assert after < before / 4
