"""Slot banks that misbehave at a point a test chooses."""

import threading
from collections.abc import Sequence

from torch import Tensor

from odmoe_node.bank import SlotBank
from odmoe_node.stopping import BrokenOffError, Stop

GATE_S = 60.0


class TroubledBank:
    """Another bank with trouble: experts whose load fails, or goes on until it is broken off, and gates that loads and
    computes stop at. `computed_on` are the threads that computed, in order."""

    def __init__(self, bank: SlotBank) -> None:
        self.record_bytes, self.slot_bytes, self.arena_bytes = bank.record_bytes, bank.slot_bytes, bank.arena_bytes
        self.unreadable: set[tuple[int, int]] = set()
        self.endless: set[tuple[int, int]] = set()
        self.endless_began = threading.Event()
        self.computed_on: list[str] = []
        self.compute_gate = threading.Event()
        self.load_gate = threading.Event()
        self.compute_began = threading.Event()
        self.compute_gate.set()
        self.load_gate.set()
        self._bank = bank

    def load(self, slot: int, layer: int, expert: int, *, stop: Stop | None = None) -> float:
        assert self.load_gate.wait(GATE_S)
        if (layer, expert) in self.unreadable:
            raise OSError(5, "Input/output error")
        if (layer, expert) in self.endless:
            self.endless_began.set()
            assert stop is not None
            assert stop.wait(GATE_S)
            raise BrokenOffError
        return self._bank.load(slot, layer, expert, stop=stop)

    def rows(self, slot: int, x_NH: Tensor, runs: Sequence[int] = ()) -> Tensor:
        self.compute_began.set()
        self.computed_on.append(threading.current_thread().name)
        assert self.compute_gate.wait(GATE_S)
        return self._bank.rows(slot, x_NH, runs)
