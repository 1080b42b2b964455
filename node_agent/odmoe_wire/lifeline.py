"""A role's process: ending with the one that started it, and a heap that is left alone. Knows no role."""

import ctypes
import gc
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


def settle_heap() -> None:
    """Take all that is loaded by now out of the garbage collector's sight.

    To be called once a role has loaded: libraries and model stay to the end anyway. Without it the collector walks
    them in the midst of a token, and for seconds at the interpreter's exit.
    """
    gc.collect()
    gc.freeze()
