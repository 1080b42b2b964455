"""Which policies are compared, at how many slots, batch sizes and alphas. Pure."""

from collections.abc import Sequence
from typing import Final

from odmoe_server.bench.importance.device import Features
from odmoe_server.bench.importance.fleet import Arm, LayerLikeness

SHARES: Final = (0.15, 0.287, 0.5)
GOAL_SHARE: Final = 0.287
ALPHAS: Final = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
FEW_ALPHAS: Final = (0.25, 0.35, 0.6)
# Timed on a server, which takes much longer than a replay.
SERVED_ALPHAS: Final = (0.1, 0.25, 0.3, 0.35, 0.6)
# At which the cumulative ablation and the alternatives are measured.
GOAL_ALPHA: Final = 0.3
LIKE_ALPHAS: Final = (0.3, 0.6)
# Steps over which scores are averaged, beside the default.
WINDOWS: Final = (1, 2, 4, 8, 32, 64, 256)

LRU: Final = "lru"
IMPORTANCE: Final = "importance"
LEARNED: Final = "importance-learned"
# The paper's own prefetch, of top-score experts only; then the short cuts of its authors' code (`shortcuts`), each
# alone and all at once, and whether substitution takes them.
BESIDE: Final = {
    "prefetch-top": (Features(eviction="score", prefetch=True, only_top=True), False),
    "code-substitution": (Features(eviction="score"), True),
    "code-prefetch": (Features(eviction="score", prefetch=True, fetches_one=True, only_top=True), False),
    "code-eviction": (Features(eviction="lru", prefetch=True, only_top=True), False),
    "code": (Features(eviction="lru", prefetch=True, fetches_one=True, only_top=True), True),
}
# Each with what came before it.
ABLATION: Final = {
    LRU: Features(eviction="lru"),
    "eviction": Features(eviction="score"),
    "substitution": Features(eviction="score"),
    "prefetch": Features(eviction="score", prefetch=True),
    IMPORTANCE: Features(eviction="score", prefetch=True, host=True),
}
_FORECAST: Final = "forecast"
_AS_GATED: Final = {
    LRU: ABLATION[LRU],
    "lfu": Features(eviction="lfu"),
    "eviction": ABLATION["eviction"],
    IMPORTANCE: ABLATION[IMPORTANCE],
}


def arms(*, batches: Sequence[int], quick: bool, like: LayerLikeness | None) -> list[Arm]:
    """All of them, in the order of the record. With `quick`, slots at the goal's share only and fewer alphas."""
    found = []
    for share in (GOAL_SHARE,) if quick else SHARES:
        for batch in batches:
            found += _of(share, batch, FEW_ALPHAS if quick or share != GOAL_SHARE else ALPHAS)
    if like is not None:
        found += [
            _arm(LEARNED, GOAL_SHARE, batch, alpha, ABLATION[IMPORTANCE], like)
            for batch in batches
            for alpha in LIKE_ALPHAS
        ]
    found += [
        Arm(policy=name, slots_share=GOAL_SHARE, batch=batch, alpha=GOAL_ALPHA, features=features, as_coded=as_coded)
        for batch in batches
        for name, (features, as_coded) in BESIDE.items()
    ]
    if not quick:
        found += [_arm(_FORECAST, GOAL_SHARE, batch, 0.0, Features(eviction="forecast")) for batch in batches]
        found += [
            _arm("eviction", GOAL_SHARE, batch, 0.0, Features(eviction="score", window=window))
            for batch in batches
            for window in WINDOWS
        ]
    return found


def _of(share: float, batch: int, alphas: Sequence[float]) -> list[Arm]:
    return [
        *(_arm(name, share, batch, 0.0, features) for name, features in _AS_GATED.items()),
        *(_arm(name, share, batch, GOAL_ALPHA, ABLATION[name]) for name in ("substitution", "prefetch")),
        *(_arm(IMPORTANCE, share, batch, alpha, ABLATION[IMPORTANCE]) for alpha in alphas),
    ]


def _arm(
    policy: str, share: float, batch: int, alpha: float, features: Features, like: LayerLikeness | None = None
) -> Arm:
    return Arm(policy=policy, slots_share=share, batch=batch, alpha=alpha, features=features, like=like)
