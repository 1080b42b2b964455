"""transformers without its own progress bars, for as long as we have one of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Switch transformers' progress bars off inside, and back on if they were on."""
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()
