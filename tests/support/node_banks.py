"""Slot banks that misbehave at a point a test chooses."""

import threading

from torch import Tensor

from odmoe_node.bank import SlotBank

GATE_S = 60.0


class TroubledBank:
    """Another bank with trouble: experts whose load fails, and gates that loads and computes stop at."""

    def __init__(self, bank: SlotBank) -> None:
        self.record_bytes, self.arena_bytes = bank.record_bytes, bank.arena_bytes
        self.unreadable: set[tuple[int, int]] = set()
        self.compute_gate = threading.Event()
        self.load_gate = threading.Event()
        self.compute_began = threading.Event()
        self.compute_gate.set()
        self.load_gate.set()
        self._bank = bank

    def load(self, slot: int, layer: int, expert: int) -> float:
        assert self.load_gate.wait(GATE_S)
        if (layer, expert) in self.unreadable:
            raise OSError(5, "Input/output error")
        return self._bank.load(slot, layer, expert)

    def rows(self, slot: int, x_NH: Tensor) -> Tensor:
        self.compute_began.set()
        assert self.compute_gate.wait(GATE_S)
        return self._bank.rows(slot, x_NH)
