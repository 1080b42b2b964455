"""When the nodes learn of a forecast and how good it is. Knows times of the shadow and of tokens; loads nothing.

Experts of one layer are forecast right or wrong independently of each other, with the recall of their token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from odmoe_server.planner.machines import Times


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """How experts are forecast. `recall` is that of each token, the last one for all that follow. Alignment with
    the full model comes every so many tokens, or never (0). With `run_ahead` the shadow starts a token up to so many
    before the full model has confirmed the one before; it is wrong about that one with `1 - agreement`. The shadow has
    the prompt's keys and values `begins_s` after the first token.

    Of the tokens it has gone on with, `draft` are verified in one step with the newest.

    With the source `slots` nothing is forecast, and `recall` is the share of experts found in slots."""

    source: Literal["shadow", "random", "none", "slots"] = "shadow"
    recall: tuple[float, ...] = (1.0,)
    align_token: int = 1
    align_kv: int = 1
    run_ahead: int = 0
    agreement: float = 1.0
    draft: int = 0
    begins_s: float = 0.0

    def recall_at(self, token: int) -> float:
        return self.recall[min(token, len(self.recall) - 1)]


class Schedule:
    """When each token's forecasts reach the nodes, token by token. Tokens must be asked for in order."""

    def __init__(self, forecast: Forecast, times: Times, *, layers: int, random: Random) -> None:
        self._forecast = forecast
        self._times = times
        self._layers = layers
        self._random = random
        self._shadow_free_s = forecast.begins_s

    def waits(self, token: int) -> bool:
        """Whether the shadow cannot begin the token before the full model has ended the one before. Draws once
        for each token of a shadow that runs ahead."""
        forecast = self._forecast
        if forecast.source != "shadow" or token == 0:
            return False
        aligned = _due(token, forecast.align_token) or _due(token, forecast.align_kv)
        return aligned and (forecast.run_ahead == 0 or self._random.random() >= forecast.agreement)

    def known_s(self, token: int, *, ends_s: Sequence[float], waits: bool) -> list[float]:
        """For each layer, when its forecast reaches the nodes. `ends_s[i]` is when the full model ended token i."""
        times, forecast = self._times, self._forecast
        if forecast.source in ("none", "slots"):
            return [math.inf] * self._layers
        if forecast.source == "random":
            return [0.0] * self._layers
        begin_s = self._shadow_free_s
        if waits:
            # Late departure: the token, and if due the keys and values since the last time, come first.
            kv_s = forecast.align_kv * times.kv_s if _due(token, forecast.align_kv) else 0.0
            begin_s = max(begin_s, ends_s[token - 1] + times.latency_s + kv_s)
        elif forecast.run_ahead and token > forecast.run_ahead:
            begin_s = max(begin_s, ends_s[token - 1 - forecast.run_ahead])
        self._shadow_free_s = begin_s + self._layers * times.shadow_s
        return [begin_s + (layer + 1) * times.shadow_s + times.latency_s for layer in range(self._layers)]


def _due(token: int, period: int) -> bool:
    return period > 0 and token % period == 0


def right(forecast: Forecast, token: int, *, num_experts: int, top_k: int, random: Random) -> list[bool]:
    """For each of a layer's top-k experts, whether the forecast has it."""
    if forecast.source == "random":
        guess = set(random.sample(range(num_experts), top_k))
        return [expert in guess for expert in range(top_k)]
    recall = forecast.recall_at(token)
    return [random.random() < recall for _ in range(top_k)]
