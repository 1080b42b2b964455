"""What importance mode decides about one layer of one step, as the caller carries it out. Data only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from odmoe_model.scores import Scores
from odmoe_model.seam import ExpertsCall
from odmoe_wire.messages import ExpertRef


@dataclass(frozen=True, kw_only=True)
class Orders:
    """`calls`: the choices that are served, one a lane. `where`: expert -> node; `leaving`: node -> which of its
    experts go first if it needs room. `host`: experts the server computes itself. `replaced`: of each lane, the experts
    others stand in for. `scores`: of all experts, in each lane."""

    calls: Sequence[ExpertsCall]
    where: Mapping[int, str]
    leaving: Mapping[str, tuple[ExpertRef, ...]]
    host: tuple[int, ...]
    replaced: Sequence[frozenset[int]]
    scores: Sequence[Scores]
