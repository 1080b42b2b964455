"""Which experts leave their slots first when room is needed: four policies behind one signature. Pure.

SMoE's own is `score` (eq. 3): the lowest mean score over the last steps goes first, whether or not the expert was
chosen in them. Whatever the policy, experts of the layer at work are protected and go last.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, Literal

from odmoe_server.importance.history import History, Key

PolicyName = Literal["score", "lru", "lfu", "forecast"]
Foreseen = Mapping[Key, int]
"""Expert -> how many layers from now a forecast has it needed; those that are in none are left out."""
Worth = Callable[[Key, History, Foreseen], tuple[float, ...]]
"""What sorts an expert: the least goes first."""


def by_score(key: Key, history: History, foreseen: Foreseen) -> tuple[float, ...]:
    """The mean score of the last steps, then the last use."""
    return (history.mean_score(key), history.last_used(key))


def by_last_use(key: Key, history: History, foreseen: Foreseen) -> tuple[float, ...]:
    """The last use."""
    return (history.last_used(key),)


def by_frequency(key: Key, history: History, foreseen: Foreseen) -> tuple[float, ...]:
    """How often it was used, then the last use."""
    return (history.times_used(key), history.last_used(key))


def by_forecast(key: Key, history: History, foreseen: Foreseen) -> tuple[float, ...]:
    """What no forecast names goes first, by score; then what is needed latest."""
    if key not in foreseen:
        return (0, *by_score(key, history, foreseen))
    return (1, -foreseen[key])


POLICIES: Final[dict[PolicyName, Worth]] = {
    "score": by_score,
    "lru": by_last_use,
    "lfu": by_frequency,
    "forecast": by_forecast,
}


def victims(
    held: Iterable[Key],
    *,
    policy: PolicyName,
    history: History,
    foreseen: Foreseen | None = None,
    protected: Collection[Key] = (),
) -> list[Key]:
    """The experts in slots in the order in which they should leave; `protected` ones never do."""
    worth = POLICIES[policy]
    return sorted(
        (key for key in held if key not in protected), key=lambda key: (*worth(key, history, foreseen or {}), key)
    )
