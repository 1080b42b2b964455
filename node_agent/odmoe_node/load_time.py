"""What one load takes a node, found out by trying. Knows a bank; knows nothing of who asks for what.

On two busy cores eight nodes that began at once (records of 5.3 MB, in the page cache, at most 16 tries and 0.25 s)
found 580 to 674 microseconds; with a disk to fight for, up to 123 ms. Hence more time now.
"""

import logging
import time
from collections.abc import Callable

from odmoe_node.bank import SlotBank

log = logging.getLogger(__name__)

MAX_TRIES = 24
# No try begins after so long. One is always made, however slow the link.
ENOUGH_S = 1.0


def try_load_us(bank: SlotBank, *, clock: Callable[[], float] = time.perf_counter) -> int:
    """Microseconds of the quickest of a few loads of a whole expert into slot 0, before anybody needs it: others may
    keep this machine busy now and then, none makes it faster. 0 if the expert cannot be loaded."""
    began_s = clock()
    tries_s: list[float] = []
    try:
        while not tries_s or (len(tries_s) < MAX_TRIES and clock() - began_s < ENOUGH_S):
            tries_s.append(bank.load(0, 0, 0))
    except (OSError, RuntimeError) as error:
        log.warning("could not find out what a load takes: %s", error)
        return 0
    # A slot for slices holds part of an expert; the rest takes its time too.
    whole = max(1.0, bank.record_bytes / bank.slot_bytes)
    load_us = max(1, round(min(tries_s) * whole * 1e6))
    log.info("a load takes %.3f ms, the quickest of %d", load_us / 1000, len(tries_s))
    return load_us
