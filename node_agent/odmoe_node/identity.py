"""A node's default name: unique on its host, the same after a restart. Knows no settings and no cluster.

The name is host, digest of the store's path, number. Each running node holds a lock on the file of its number, and
takes the lowest that is free: nodes that are started again together get the same set of names again.
"""

import fcntl
import hashlib
import os
import re
import socket
import tempfile
from pathlib import Path

MAX_NODES = 1000


class DefaultName:
    """Holds the name until `close`, or the end of the process. Raises ValueError if none can be had."""

    def __init__(self, store: Path, *, directory: Path | None = None, host: str | None = None) -> None:
        digest = hashlib.sha256(str(store.resolve()).encode()).hexdigest()[:8]
        plain_host = re.sub(r"[^A-Za-z0-9-]", "-", (host or socket.gethostname()).split(".")[0]).strip("-")
        directory = directory or _lock_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(MAX_NODES):
            fd = _try_lock(directory / f"{digest}-{number}.lock")
            if fd is not None:
                self.name = f"{plain_host[:40] or 'node'}-{digest}-{number}"
                self._fd = fd
                return
        raise ValueError(f"{MAX_NODES} nodes of this store run on this host already; name this one with --node-id")

    def close(self) -> None:
        """Let another node have the name."""
        os.close(self._fd)


def _lock_directory() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "odmoe" if runtime else Path(tempfile.gettempdir()) / f"odmoe-{os.getuid()}"


def _try_lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
