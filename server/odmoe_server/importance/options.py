"""What importance mode can be told. Values only; the ranges are checked where settings are read."""

from dataclasses import dataclass
from typing import Literal

from odmoe_server.importance.eviction import PolicyName

# From what it is known what later layers will choose: from the next gate's opinion of this layer's input, from the
# shadow's forecasts, from these where there are any and else from the gate, or from nothing.
PrefetchSource = Literal["auto", "gate", "shadow", "off"]


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions:
    """`alpha`: for requests that name none; `max_alpha`: the most one may name, 0 switches substitution off.
    `max_weight`: share of a token's gate weight that may be replaced in a layer. `window`: steps whose scores count in
    eviction. `cpu_share`: the server computes some missing experts itself."""

    alpha: float = 0.3
    max_alpha: float = 1.0
    max_weight: float = 1.0
    eviction: PolicyName = "score"
    window: int = 16
    prefetch: PrefetchSource = "auto"
    cpu_share: bool = False
