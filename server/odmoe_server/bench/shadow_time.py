"""How long the shadow takes for a layer, read off a timeline. Knows the form of `--timeline` files; starts nothing."""

import json
import re
from statistics import median
from typing import Final

# The first layer's slice begins when the token came, hence is none of a layer's work alone.
_LATER_LAYER: Final = re.compile(r"shadow L[1-9]\d*")
_MICROSECOND: Final = 1e-6


def shadow_layer_s(timeline: str) -> float | None:
    """The median of all layers but the first of each token; None where no shadow is drawn."""
    drawn = json.loads(timeline)
    events = drawn["traceEvents"] if isinstance(drawn, dict) else drawn
    took = [e["dur"] for e in events if e["ph"] == "X" and _LATER_LAYER.fullmatch(e["name"])]
    return median(took) * _MICROSECOND if took else None
