"""Taking pages of a mapped file out of this process's memory again. Knows one system call, no stores.

The kernel keeps the pages in its own cache as long as it has room; only the process's claim on them ends.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable

from torch import Tensor


def page_forgetter() -> Callable[[Tensor], None]:
    """A function that forgets the whole pages inside a read-only view of a mapped file. Only Linux promises
    that they are read again when touched; elsewhere it does nothing."""
    if sys.platform != "linux":
        return lambda mapped_B: None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def forget(mapped_B: Tensor) -> None:
        first = -(-mapped_B.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length_bytes = (mapped_B.data_ptr() + mapped_B.numel() - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length_bytes > 0 and libc.madvise(first, length_bytes, mmap.MADV_DONTNEED):
            code = ctypes.get_errno()
            raise OSError(code, f"madvise: {os.strerror(code)}")

    return forget
