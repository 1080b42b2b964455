"""Pages of a mapped file in this process's memory: fetched where that may fail, and forgotten. Knows one system call.

The kernel keeps the pages in its own cache as long as it has room; only the process's claim on them ends.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from torch import Tensor

# Not in Python's mmap yet; Linux has it since 5.14.
_POPULATE_READ: Final = 22


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def fetch_pages(mapped: Tensor) -> None:
    """Have the kernel bring the pages of a view of a mapped file. Raises OSError where it cannot, because the disk
    fails or the file was cut short: to touch such a page would end the process (SIGBUS). Elsewhere than on Linux, and
    on kernels that do not know the call, it touches them, if they lie in one piece."""
    if not mapped.numel() or (sys.platform == "linux" and _populate(mapped)):
        return
    if mapped.is_contiguous():
        mapped.view(-1)[:: mmap.PAGESIZE // mapped.element_size()].max()  # any use of them will do


def _populate(mapped: Tensor) -> bool:
    """False on a kernel that does not know the call."""
    first = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    steps = sum((size - 1) * stride for size, stride in zip(mapped.shape, mapped.stride(), strict=True))
    end = mapped.data_ptr() + (steps + 1) * mapped.element_size()
    if _libc().madvise(first, end - first, _POPULATE_READ):
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            reason = f"the store file cannot be read ({os.strerror(code)}): it was cut short, or the disk fails"
            raise OSError(code, reason)
        return False
    return True


def page_forgetter() -> Callable[[Tensor], None]:
    """A function that forgets the whole pages inside a read-only view of a mapped file. Only Linux promises
    that they are read again when touched; elsewhere it does nothing."""
    if sys.platform != "linux":
        return lambda mapped_B: None

    def forget(mapped_B: Tensor) -> None:
        first = -(-mapped_B.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length_bytes = (mapped_B.data_ptr() + mapped_B.numel() - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length_bytes > 0 and _libc().madvise(first, length_bytes, mmap.MADV_DONTNEED):
            code = ctypes.get_errno()
            raise OSError(code, f"madvise: {os.strerror(code)}")

    return forget
