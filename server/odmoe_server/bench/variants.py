"""What is compared: each variant's settings, the speed of its links and the slots of its nodes. Pure.

`resident`, which is plain transformers, is no variant of odmoe and is measured elsewhere (`resident.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

RESIDENT: Final = "resident"
GIGABYTE: Final = 1e9


@dataclass(frozen=True, kw_only=True)
class Variant:
    """`settings` are those of `odmoe serve` that make it. `same_bytes`: its slots take all the device bytes that the
    others' slots and shadow take together."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    same_bytes: bool = False


def _late(align_token: str, align_kv: str) -> dict[str, Any]:
    return {"draft": 0, "run_ahead": 0, "align_token": align_token, "align_kv": align_kv}


VARIANTS: Final = (
    Variant(name="on-demand", settings={"draft": 0, "run_ahead": 1}),
    # Any node may be needed at any layer then.
    Variant(name="drafts", settings={"draft": 3, "run_ahead": 8, "group_size": None}),
    Variant(name="on-demand-feedback", settings={"draft": 0, "run_ahead": 1, "feedback": True}),
    Variant(name="on-demand-late", settings=_late("1", "1")),
    Variant(name="token-only", settings=_late("1", "off")),
    Variant(name="kv-only", settings=_late("off", "1")),
    Variant(name="no-alignment", settings=_late("off", "off")),
    Variant(name="random-prefetch", settings={"predictor_kind": "random"}),
    Variant(name="no-predictor", settings={"predictor": False}),
    Variant(name="lru", settings={"predictor": False, "slot_mode": "lru"}, same_bytes=True),
)
# Measured once more with loads that take next to no time: what then remains beside computing is the price of messages.
WITHOUT_LOADS: Final = ("on-demand", "no-predictor")
NEXT_TO_NOTHING: Final = 1e-3
QUICK: Final = ("on-demand", "on-demand-late", "no-predictor")


def named(names: Sequence[str]) -> list[Variant]:
    """Those of that name, in the order of the table. Raises ValueError for a name that is none."""
    known = [variant.name for variant in VARIANTS]
    if unknown := sorted(set(names) - {*known, RESIDENT}):
        raise ValueError(f"there is no variant {unknown[0]!r}; there are {', '.join(known)}")
    return [variant for variant in VARIANTS if variant.name in names]


def link_gbps(*, record_bytes: int, link_ratio: float, layer_s: float) -> float:
    """The speed at which loading an expert takes `link_ratio` times what a layer takes to compute, in GB/s."""
    return record_bytes / (link_ratio * layer_s) / GIGABYTE


def lru_slots(*, nodes: int, record_bytes: int, shadow_bytes: int) -> int:
    """Slots a node gets for its share of one slot a node and the shadow's bytes; what is over is lost."""
    return (nodes * record_bytes + shadow_bytes) // (nodes * record_bytes)


def chosen(*, quick: bool) -> list[str]:
    """The names of those that are measured when nobody says which."""
    return list(QUICK) if quick else [variant.name for variant in VARIANTS]
