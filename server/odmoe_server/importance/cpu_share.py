"""Which missing experts are computed on the host instead of loaded (SMoE Algorithm 2). Pure.

The experts are sorted by score; the best go over the links, the least to the host, whichever of the two would be done
first so far, so that both end at about the same time. Costs are measured: means of the last so many.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """`load` in the order in which they are asked for, the best scored first; `host` as they are computed."""

    load: tuple[int, ...]
    host: tuple[int, ...]


def split(missing: Mapping[int, float], *, links: Mapping[int, str], load_s: float, host_s: float) -> Split:
    """Share out the missing experts (with their scores; of equals the lower index counts as better). `links` says over
    which node's link each would come: links run side by side, loads of one link one after the other."""
    order = sorted(missing, key=lambda expert: (-missing[expert], expert))
    queues: Counter[str] = Counter()
    load: list[int] = []
    host: list[int] = []
    while order:
        busy_s = load_s * max(queues.values(), default=0)
        if busy_s <= host_s * len(host):
            expert = order.pop(0)
            queues[links[expert]] += 1
            load.append(expert)
        else:
            host.append(order.pop())
    return Split(load=tuple(load), host=tuple(host))


@dataclass(kw_only=True)
class Costs:
    """Seconds one load and one computation on the host took lately; None until both were seen."""

    window: int = 10
    _load_s: deque[float] = field(init=False)
    _host_s: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self._load_s, self._host_s = deque(maxlen=self.window), deque(maxlen=self.window)

    def loaded(self, seconds: float) -> None:
        """A load took so long."""
        self._load_s.append(seconds)

    def computed(self, seconds: float) -> None:
        """One expert took the host so long."""
        self._host_s.append(seconds)

    @property
    def load_s(self) -> float | None:
        """Mean of the last loads."""
        return _mean(self._load_s)

    @property
    def host_s(self) -> float | None:
        """Mean of the last computations on the host."""
        return _mean(self._host_s)


def _mean(values: deque[float]) -> float | None:
    known = list(values)  # in one go: another thread may add to them
    return sum(known) / len(known) if known else None
