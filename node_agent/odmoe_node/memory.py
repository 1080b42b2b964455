"""What the operating system says this process uses, and what there is. Knows nothing of arenas."""

import os
import resource
import sys
from pathlib import Path


def resident_bytes() -> int:
    """Resident set size; where the system does not tell the present one, the largest so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGESIZE")


def physical_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
