"""How this process logs: one line each, to stderr."""

import logging

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# Talkative at info, of no interest to who runs a server.
_QUIET = ("httpx", "huggingface_hub", "filelock", "uvicorn.error")


def configure(level: str) -> None:
    """Set up the root logger; called once, at the start of a process."""
    logging.basicConfig(level=level.upper(), format=_FORMAT, datefmt="%H:%M:%S")
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
