"""How much memory a sequence's keys and values take, and whether there is room for one more. Knows no request.

A sequence reserves what it can come to at most, prompt and answer, before it begins. So memory never runs out half-way,
nothing has to be thrown out and computed again (which would round differently), and whoever does not fit waits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from odmoe_model.kvcache import KEPT_POSITIONS
from odmoe_model.seam import ExpertsCall
from odmoe_server.moe.lanes import Lane, run_lanes

# Of the memory that is free when the weights are loaded.
DEFAULT_SHARE: Final = 0.25
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED: Final = Path("/sys/fs/cgroup/memory.current")
_MEMINFO: Final = Path("/proc/meminfo")
_FALLBACK_BYTES: Final = 1 << 30


@dataclass(frozen=True, kw_only=True)
class KvSize:
    """Bytes of a cache. `layers`: bytes a position (or a column of a state), and how many are kept (None: all).
    `logits_row`: bytes of the logits behind one token, which are kept for all of a chunk whose tokens are told of."""

    layers: tuple[tuple[int, int | None], ...]
    logits_row: int = 0

    def bytes_for(self, positions: int) -> int:
        """Of a sequence of so many positions."""
        return sum(size * (positions if most is None else min(positions, most)) for size, most in self.layers)

    def bytes_of_reading(self, num_prompt: int, *, chunk: int | None) -> int:
        """Of the logits of a prompt whose every token is told of, of which one chunk's are there at a time."""
        return self.logits_row * (num_prompt if chunk is None else min(num_prompt, chunk))

    def positions_in(self, budget_bytes: int, *, most: int) -> int:
        """The longest sequence up to `most` that fits."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes_for(middle) <= budget_bytes else (low, middle - 1)
        return low


def measure_kv(model: PreTrainedModel, new_cache: Callable[[], DynamicCache]) -> KvSize:
    """Try it with one token; the experts, which keep nothing, give zeros."""
    cache = new_cache()
    (logits_V,) = run_lanes(model, [Lane(sequence=0, position=0, ids=[0], cache=cache)], _no_experts)
    layers: list[tuple[int, int | None]] = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            state_BCW = layer.conv_states[0]
            layers.append((state_BCW.nbytes // state_BCW.shape[-1], layer.conv_kernel_size[0] + KEPT_POSITIONS))
            continue
        window = layer.sliding_window + KEPT_POSITIONS if isinstance(layer, DynamicSlidingWindowLayer) else None
        layers.append((layer.keys.nbytes + layer.values.nbytes, window))
    return KvSize(layers=tuple(layers), logits_row=logits_V.nbytes)


def _no_experts(lanes: Sequence[Lane], calls: Sequence[ExpertsCall]) -> list[torch.Tensor]:
    return [torch.zeros_like(call.x_TH) for call in calls]


@dataclass(kw_only=True)
class Room:
    """What is reserved, by sequence. Pure."""

    budget_bytes: int
    max_running: int
    reserved: dict[int, int] = field(default_factory=dict)

    @property
    def reserved_bytes(self) -> int:
        """Of all sequences."""
        return sum(self.reserved.values())

    def admit(self, sequence: int, need_bytes: int, *, beside_bytes: int = 0) -> bool:
        """Reserve, if it fits beside the others and what else the budget is used for."""
        if len(self.reserved) >= self.max_running:
            return False
        if self.reserved_bytes + beside_bytes + need_bytes > self.budget_bytes:
            return False
        self.reserved[sequence] = need_bytes
        return True

    def leave(self, sequence: int) -> None:
        """The sequence is over."""
        self.reserved.pop(sequence, None)


def default_budget_bytes(device: str) -> int:
    """A share of what is free now, on the device where keys and values live."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * DEFAULT_SHARE)
    free = [found for found in (_free_in_system(), _free_in_cgroup()) if found is not None]
    return int(min(free, default=_FALLBACK_BYTES) * DEFAULT_SHARE)


def _free_in_system() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_in_cgroup() -> int | None:
    """Of a container's limit; None without one."""
    try:
        limit, used = (path.read_text(encoding="ascii").strip() for path in (_CGROUP_LIMIT, _CGROUP_USED))
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() else None
