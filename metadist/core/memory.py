"""How this process gets memory from the system."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # Of glibc's malloc.h.
LARGEST = 2**30


def keep_freed_memory() -> None:
    """Has malloc keep what is freed for whoever asks next, where it is glibc's.

    It would give large tensors back to the system, which makes each of their pages anew, and writes zeros into it,
    when the next task asks for as much.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
