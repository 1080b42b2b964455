"""What is remembered of each expert, to judge whether it stays in its slot. Pure.

The scores of all experts in the last steps, chosen or not; when each was used and how often; what is forecast. A layer
has seen a step when its gate has spoken in it.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Key(NamedTuple):
    """One expert of the model."""

    layer: int
    expert: int


class History:
    """Of a model of `num_layers` times `num_experts`; scores are averaged over a layer's last `window` steps."""

    def __init__(self, *, num_layers: int, num_experts: int, window: int) -> None:
        if window < 1:
            raise ValueError(f"the window must be at least one step, not {window}")
        self._scores: list[deque[list[float]]] = [deque(maxlen=window) for _ in range(num_layers)]
        self._sums = [[0.0] * num_experts for _ in range(num_layers)]
        self._used: dict[Key, int] = {}
        self._times: dict[Key, int] = {}
        self._clock = 0

    def scored(self, layer: int, scores_TE: Sequence[Sequence[float]]) -> None:
        """The gate of a layer has spoken: all experts' scores, of each token of the step; their mean is what counts."""
        mean = [sum(column) / len(scores_TE) for column in zip(*scores_TE, strict=True)]
        steps = self._scores[layer]
        gone = steps[0] if len(steps) == steps.maxlen else None
        steps.append(mean)
        if gone is None:
            self._sums[layer] = [total + new for total, new in zip(self._sums[layer], mean, strict=True)]
        else:  # added up anew, so that rounding does not pile up over a long run
            self._sums[layer] = [sum(column) for column in zip(*steps, strict=True)]

    def used(self, layer: int, experts: Iterable[int]) -> None:
        """These experts were computed."""
        self._clock += 1
        for expert in experts:
            key = Key(layer, expert)
            self._used[key] = self._clock
            self._times[key] = self._times.get(key, 0) + 1

    def mean_score(self, key: Key) -> float:
        """Over the last steps the layer has seen; 0 when it has seen none."""
        steps = len(self._scores[key.layer])
        return self._sums[key.layer][key.expert] / steps if steps else 0.0

    def last_used(self, key: Key) -> int:
        """Grows with time; 0 when it never was."""
        return self._used.get(key, 0)

    def times_used(self, key: Key) -> int:
        """How often it was computed."""
        return self._times.get(key, 0)
