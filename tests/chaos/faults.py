"""Which faults befall whom and for how long: drawn by a seed. Pure; knows no process and no socket."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["kill", "restart", "pause", "delay", "drop", "duplicate", "partition"]
Role = Literal["node", "predictor", "server"]

KINDS: Final[tuple[Kind, ...]] = ("kill", "restart", "pause", "delay", "drop", "duplicate", "partition")
# The process goes or stands still; the others befall its links.
OF_PROCESSES: Final = frozenset({"kill", "restart", "pause"})
# These change a connection's frames. CURVE's are numbered, and libzmq ends the connection of who repeats one: under it
# they would be partitions by another name.
OF_FRAMES: Final = frozenset({"drop", "duplicate"})
# The server's process goes only in the first part of a campaign: after that its memory is watched.
SERVER_GOES_WITHIN: Final = 0.3
_WEIGHTS: Final[dict[Role, int]] = {"node": 6, "predictor": 2, "server": 2}
# How long a fault lasts: some end before anyone notices, some only after the peer was given up.
_HOLD_S: Final[dict[Kind, tuple[float, float]]] = {
    "kill": (0.0, 1.5),
    "restart": (0.0, 0.5),
    "pause": (0.2, 4.5),
    "delay": (0.5, 2.0),
    "drop": (0.5, 2.0),
    "duplicate": (0.5, 2.0),
    "partition": (0.2, 4.5),
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`target` is a node's name, `predictor` or `server`. `strength` is the delay in seconds, or the share of messages
    that are lost or repeated. A partition is `silent` (nothing arrives) or an error of the connection."""

    number: int
    kind: Kind
    role: Role
    target: str
    hold_s: float
    wait_s: float
    strength: float = 0.0
    silent: bool = True

    @property
    def is_alone(self) -> bool:
        """Nothing else may fail meanwhile: there is one server."""
        return self.role == "server"


def draw(
    *, seed: int, count: int, nodes: Sequence[str], pace_s: float, without: frozenset[str] = frozenset()
) -> list[Fault]:
    """`count` faults, `pace_s` apart on average. Every kind but those `without` befalls every role as early as can
    be."""
    dice = random.Random(seed)
    kinds = [kind for kind in KINDS if kind not in without]
    pairs: list[tuple[Role, Kind]] = [(role, kind) for role in _WEIGHTS for kind in kinds]
    dice.shuffle(pairs)
    pairs.sort(key=lambda pair: pair[0] != "server" or pair[1] not in OF_PROCESSES)
    faults = []
    for number in range(count):
        role, kind = pairs[number] if number < len(pairs) else _pair(dice, kinds, done=number / count)
        target = dice.choice(list(nodes)) if role == "node" else role
        faults.append(_fault(dice, number=number, role=role, kind=kind, target=target, pace_s=pace_s))
    return faults


def _pair(dice: random.Random, kinds: Sequence[Kind], *, done: float) -> tuple[Role, Kind]:
    (role,) = dice.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
    late = role == "server" and done > SERVER_GOES_WITHIN
    return role, dice.choice([kind for kind in kinds if not (late and kind in {"kill", "restart"})])


def _fault(dice: random.Random, *, number: int, role: Role, kind: Kind, target: str, pace_s: float) -> Fault:
    strength = {"delay": dice.uniform(0.02, 0.4), "drop": dice.uniform(0.05, 0.5), "duplicate": dice.uniform(0.2, 1.0)}
    return Fault(
        number=number,
        kind=kind,
        role=role,
        target=target,
        hold_s=dice.uniform(*_HOLD_S[kind]),
        wait_s=dice.expovariate(1.0 / pace_s),
        strength=strength.get(kind, 0.0),
        silent=dice.random() < 0.7,
    )
