"""One look at a server's /metrics, and what happened between two of them. Pure; knows names of metrics, no sockets."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

_PREFIX: Final = "odmoe:"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Counters, which only grow, summed over nodes; seconds where they end in `_s`. `slot_bytes` are those each node
    has room for."""

    first_s: float = 0.0
    first_tokens: float = 0.0
    between_s: float = 0.0
    between_tokens: float = 0.0
    activations: float = 0.0
    predicted: float = 0.0
    predicted_late: float = 0.0
    hit: float = 0.0
    late: float = 0.0
    missed: float = 0.0
    stall_s: float = 0.0
    loads: float = 0.0
    loads_unused: float = 0.0
    load_s: float = 0.0
    load_bytes: float = 0.0
    compute_s: float = 0.0
    guesses: float = 0.0
    agreed: float = 0.0
    realigned: float = 0.0
    slot_bytes: tuple[float, ...] = ()

    def since(self, before: "Reading") -> "Reading":
        """What came since; slots as they are now."""
        grown = {name: getattr(self, name) - getattr(before, name) for name in _SAMPLES}
        return Reading(**grown, slot_bytes=self.slot_bytes)


# Field: name of the sample behind the prefix, and labels it must have.
_SAMPLES: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "first_s": ("time_to_first_token_seconds_sum", {}),
    "first_tokens": ("time_to_first_token_seconds_count", {}),
    "between_s": ("inter_token_latency_seconds_sum", {}),
    "between_tokens": ("inter_token_latency_seconds_count", {}),
    "activations": ("expert_activations_total", {}),
    "predicted": ("expert_activations_predicted_total", {}),
    "predicted_late": ("expert_activations_predicted_late_total", {}),
    "hit": ("expert_predictions_total", {"outcome": "hit"}),
    "late": ("expert_predictions_total", {"outcome": "late"}),
    "missed": ("expert_predictions_total", {"outcome": "miss"}),
    "stall_s": ("expert_stall_seconds_total", {}),
    "loads": ("expert_loads_total", {}),
    "loads_unused": ("expert_loads_unused_total", {}),
    "load_s": ("expert_load_seconds_sum", {}),
    "load_bytes": ("expert_load_bytes_total", {}),
    "compute_s": ("expert_compute_seconds_total", {}),
    "guesses": ("spec_decode_num_draft_tokens_total", {}),
    "agreed": ("spec_decode_num_accepted_tokens_total", {}),
    "realigned": ("shadow_realign_total", {}),
}


def read(page: str) -> Reading:
    """The page as Prometheus would scrape it. Raises ValueError if a metric is missing: then this reads another
    version's page."""
    values: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            values[sample.name].append((sample.labels, sample.value))

    def total(name: str, labels: dict[str, str]) -> float:
        if _PREFIX + name not in values:
            raise ValueError(f"/metrics has no {_PREFIX}{name}")
        return sum(value for had, value in values[_PREFIX + name] if labels.items() <= had.items())

    found = {field: total(name, labels) for field, (name, labels) in _SAMPLES.items()}
    slots = sorted((had.get("node", ""), value) for had, value in values[_PREFIX + "expert_budget_bytes"])
    return Reading(**found, slot_bytes=tuple(value for _, value in slots))


# What nodes count; they know no prompt, so that a whole request's counts hold those of its prompt.
_OF_NODES: Final = ("loads", "load_s", "load_bytes", "compute_s")


def decoding(whole: Reading, *, prompt_only: Reading) -> Reading:
    """What a request's decoding did, from what the request did and what the same prompt did alone. Loads that nobody
    used stay those of the whole request: which of the prompt's are in vain is a matter of chance."""
    less = {name: getattr(whole, name) - getattr(prompt_only, name) for name in _OF_NODES}
    return replace(whole, **less)
