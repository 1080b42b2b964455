"""Ending with the process that started this one, however that one ends. Knows Linux's prctl, nothing else."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(sign: signal.Signals) -> None:
    """Have the kernel send `sign` to this process when the thread that started it ends.

    Raises OSError where there is no such thing.
    """
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(sign), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        signal.raise_signal(sign)  # it went while we asked
