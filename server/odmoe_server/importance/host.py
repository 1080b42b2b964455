"""Experts computed by the server itself, straight from the store's pages, while nodes load others.

Knows the store and the experts' maths; which experts and when is not decided here.

N rows of one expert, H hidden size.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore


class HostExperts:
    """Its results are the bits a node's would be."""

    def __init__(self, store: ExpertStore, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._store = store
        self._maths = ExpertMaths(store.manifest)
        self._maths.prepare_for_runs(store.fields(store.record(0, 0)))
        self._clock = clock

    @torch.inference_mode()
    def rows(self, layer: int, expert: int, x_NH: Tensor, runs: Sequence[int]) -> tuple[Tensor, float]:
        """y_NH, unweighted, on the CPU as a node's would come; and the seconds it took."""
        began_s = self._clock()
        fields = self._store.fields(self._store.record(layer, expert))
        y_NH = self._maths.rows(fields, x_NH.cpu(), runs)
        return y_NH, self._clock() - began_s
