"""Importance mode as the decode loop meets it: at each MoE layer the rules of this package, applied to what is known.

Knows gates, lanes and where experts lie; sends nothing but wishes to fetch ahead. Prompts are served as the gates
chose: nearly all experts are active there, and what they leave in the cache of keys and values stays exact.

T token rows of a lane, K experts a token, E experts, N rows of one expert, H hidden size.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from odmoe_model.routers import Router
from odmoe_model.scores import Scorer, Scores
from odmoe_model.seam import ExpertsCall
from odmoe_server.cluster.events import FetchAhead
from odmoe_server.importance.cpu_share import Costs, split
from odmoe_server.importance.eviction import victims
from odmoe_server.importance.history import History, Key
from odmoe_server.importance.host import HostExperts
from odmoe_server.importance.options import ImportanceOptions, PrefetchSource
from odmoe_server.importance.orders import Orders
from odmoe_server.importance.prefetch import to_fetch
from odmoe_server.importance.residency import Residency
from odmoe_server.importance.substitution import Choice, Likeness
from odmoe_server.importance.swapping import Routed, choices_of, serve
from odmoe_server.moe.lanes import Lane
from odmoe_wire.messages import ExpertRef, Span

# How many more experts are named to go than a node needs room for: it may have begun something meanwhile.
SPARE_VICTIMS: Final = 4
# A layer is late after this and so many times its loads, one after the other. After a false alarm a good node gets no
# work for a while, so it must not come easily, yet sooner than a second node is asked (`compute_floor_s`).
PATIENCE_S: Final = 0.2
PATIENT_LOADS: Final = 4.0
# How many layers ahead experts are fetched. A gate's opinion of an earlier layer's input soon becomes a poor one.
LOOK_AHEAD: Final[Mapping[PrefetchSource, int]] = {"off": 0, "gate": 1, "auto": 3, "shadow": 3}


class Importance:
    """Decides for a model whose gates are `routers`, layer by layer. `fetch` has experts loaded; `forecast` is what the
    shadow says of a span's layer, if it has; `host` computes experts here, if the options say so; `likeness` of a layer
    judges substitutes by more than their scores."""

    def __init__(
        self,
        options: ImportanceOptions,
        *,
        routers: Sequence[Router],
        family: str,
        num_experts: int,
        residency: Residency,
        fetch: Callable[[FetchAhead], None],
        forecast: Callable[[Span, int], frozenset[int]] = lambda span, layer: frozenset(),
        host: HostExperts | None = None,
        likeness: Callable[[int], Likeness] | None = None,
    ) -> None:
        self._options = options
        self._routers = routers
        self._scorers = [Scorer(router, family=family) for router in routers]
        self._residency = residency
        self._fetch = fetch
        self._forecast = forecast
        self._host = host if options.cpu_share else None
        self._likeness = likeness
        self._host_costs = Costs()
        self._history = History(num_layers=len(routers), num_experts=num_experts, window=options.window)
        # What was asked for ahead of its layer in this step, by layer.
        self._asked: dict[int, set[int]] = {}

    # ------------------------------------------------------------------------------------------ before the computes

    def choose(self, lanes: Sequence[Lane], calls: Sequence[ExpertsCall]) -> Orders:
        """The gates of a layer have spoken in all lanes: who is computed in the end, and where."""
        layer = calls[0].layer
        scores = [self._scores(layer, call.x_TH) for call in calls]
        self._history.scored(layer, [torch.cat([one.weight_TE for one in scores]).mean(dim=0).tolist()])
        orders = self._orders(lanes, calls, scores, self._residency.holders(layer))
        self._history.used(layer, sorted({*orders.where, *orders.host}))
        return orders

    def _orders(
        self,
        lanes: Sequence[Lane],
        calls: Sequence[ExpertsCall],
        scores: Sequence[Scores],
        holders: Mapping[int, str],
    ) -> Orders:
        """What is to be done where these experts are at hand."""
        layer, at_hand = calls[0].layer, holders.keys()
        replaced: list[frozenset[int]] = [frozenset() for _ in lanes]
        if not lanes[0].is_prompt:
            calls, replaced = self._substitute(lanes, calls, scores, at_hand)
        needed = {expert for call in calls for row in call.index_TK.tolist() for expert in row}
        places = self._residency.places(layer, needed)
        missing = needed.difference(at_hand)
        host = () if lanes[0].is_prompt else self._host_share(missing, scores, places)
        where = {expert: node_id for expert, node_id in places.items() if expert not in host}
        protected = {Key(layer, expert) for expert in needed}
        loads = {expert: where[expert] for expert in missing if expert in where}
        leaving = self._leaving(loads, protected=protected, foreseen=self._foreseen(lanes, layer))
        return Orders(calls=calls, where=where, leaving=leaving, host=host, replaced=replaced, scores=scores)

    # ---------------------------------------------------------------------------------------------- late answers

    def patience_s(self, lanes: Sequence[Lane], orders: Orders) -> float | None:
        """How long the nodes may take before what they have is replaced; None where that is not allowed at all."""
        if all(lane.alpha <= 0 for lane in lanes):
            return None
        most = max(Counter(orders.where.values()).values(), default=0)
        return PATIENCE_S + PATIENT_LOADS * most * (self._residency.costs.load_s or 0.0)

    def without(
        self, lanes: Sequence[Lane], calls: Sequence[ExpertsCall], orders: Orders, *, late: Collection[int]
    ) -> Orders | None:
        """The same layer without the nodes that are late with some experts; None if these cannot all be replaced. What
        the gate must have is waited for, as without substitution."""
        away = {orders.where.get(expert) for expert in late}
        holders = self._residency.holders(calls[0].layer)
        rest = {expert: node_id for expert, node_id in holders.items() if node_id not in away}
        other = self._orders(lanes, calls, orders.scores, rest)
        if None in away or not other.where or not away.isdisjoint(other.where.values()):
            return None
        return other

    def _scores(self, layer: int, x_TH: Tensor) -> Scores:
        """The gate is asked a second time: its logits are not among what transformers gives its experts. A hook would
        hear them, but lanes of several steps take turns in the model, and it does not know whose rows it hears."""
        logits_TE, _ = self._routers[layer].routed(x_TH)
        return self._scorers[layer](logits_TE)

    def _substitute(
        self, lanes: Sequence[Lane], calls: Sequence[ExpertsCall], scores: Sequence[Scores], at_hand: Collection[int]
    ) -> tuple[list[ExpertsCall], list[frozenset[int]]]:
        layer = calls[0].layer
        served = serve(
            [self._routed(*one) for one in zip(lanes, calls, scores, strict=True)],
            at_hand=at_hand,
            normalised=self._scorers[layer].normalised,
            likeness=None if self._likeness is None else self._likeness(layer),
        )
        changed = [
            replace(call, index_TK=one.index_TK, weight_TK=one.weight_TK) if one.num_substituted else call
            for call, one in zip(calls, served, strict=True)
        ]
        return changed, [frozenset(swap.old for row in one.swaps for swap in row) for one in served]

    def _routed(self, lane: Lane, call: ExpertsCall, scores: Scores) -> Routed:
        max_weight = self._options.max_weight
        return Routed(
            index_TK=call.index_TK, weight_TK=call.weight_TK, scores=scores, alpha=lane.alpha, max_weight=max_weight
        )

    def _host_share(
        self, missing: Collection[int], scores: Sequence[Scores], places: Mapping[int, str]
    ) -> tuple[int, ...]:
        """What of the missing experts is computed here; nothing while the costs are not known."""
        load_s = self._residency.costs.load_s
        if self._host is None or not missing or load_s is None or not places:
            return ()
        best_E = torch.cat([one.score_TE for one in scores]).amax(dim=0).tolist()
        host_s = self._host_costs.host_s or 0.0  # one that was never tried is tried
        return split({expert: best_E[expert] for expert in missing}, links=places, load_s=load_s, host_s=host_s).host

    def _foreseen(self, lanes: Sequence[Lane], layer: int) -> dict[Key, int]:
        """What the shadow expects this step's later layers to choose."""
        if self._options.eviction != "forecast":
            return {}
        return {
            Key(later, expert): later - layer
            for later in range(layer + 1, len(self._routers))
            for lane in lanes
            for expert in self._forecast(lane.span, later)
        }

    def _leaving(
        self, loads: Mapping[int, str], *, protected: Collection[Key], foreseen: Mapping[Key, int]
    ) -> dict[str, tuple[ExpertRef, ...]]:
        """For each node that has something to load, what leaves it first."""
        order = {}
        for node_id in set(loads.values()):
            most = list(loads.values()).count(node_id) + SPARE_VICTIMS
            keys = victims(
                self._residency.on(node_id),
                policy=self._options.eviction,
                history=self._history,
                foreseen=foreseen,
                protected=protected,
            )
            order[node_id] = tuple(ExpertRef(*key) for key in keys[:most])
        return order

    # ------------------------------------------------------------------------------------------- beside the computes

    def fetch_ahead(self, lanes: Sequence[Lane], orders: Orders) -> None:
        """Have later layers' experts fetched that they are expected to choose."""
        layer = orders.calls[0].layer
        if layer == 0:
            self._asked.clear()
        if not lanes[0].is_prompt:
            last = min(layer + LOOK_AHEAD[self._options.prefetch], len(self._routers) - 1)
            for later in range(layer + 1, last + 1):
                self._fetch_ahead(lanes, orders, later)

    def host_rows(
        self, orders: Orders, rows: Mapping[int, Tensor], runs: Mapping[int, Sequence[int]]
    ) -> dict[int, Tensor]:
        """The host's share: expert -> y_NH."""
        layer = orders.calls[0].layer
        outputs: dict[int, Tensor] = {}
        for expert in orders.host:
            assert self._host is not None, "else nothing is computed here"
            outputs[expert], took_s = self._host.rows(layer, expert, rows[expert], runs[expert])
            self._host_costs.computed(took_s)
        return outputs

    def _fetch_ahead(self, lanes: Sequence[Lane], orders: Orders, later: int) -> None:
        """Have the experts fetched that a later layer is expected to need and that no slot has, or may come to."""
        layer = orders.calls[0].layer
        predicted = [
            choice for one in zip(lanes, orders.calls, strict=True) for choice in self._predicted(*one, later=later)
        ]
        asked = self._asked.setdefault(later, set())
        wanted = to_fetch(predicted, at_hand=asked.union(self._residency.holders(later)))
        places = self._residency.places(later, wanted)
        if not places:
            return
        asked.update(wanted)
        soon = {Key(later, expert) for choice in predicted for expert in choice.experts}
        now = {Key(layer, expert) for expert in (*orders.where, *orders.host)}
        leaving = self._leaving(places, protected=soon | now, foreseen=self._foreseen(lanes, layer))
        where = {expert: places[expert] for expert in wanted}
        self._fetch(FetchAhead(spans=tuple(lane.span for lane in lanes), layer=later, where=where, leaving=leaving))

    def _predicted(self, lane: Lane, call: ExpertsCall, *, later: int) -> list[Choice]:
        """What a later layer's gate is expected to say. It is asked what it makes of the rows that this layer's gate
        saw; where there is a forecast of the shadow, that says which experts, and the gate how they score."""
        source = self._options.prefetch
        forecast: frozenset[int] = frozenset() if source == "gate" else self._forecast(lane.span, later)
        if not forecast and (source == "shadow" or later > call.layer + LOOK_AHEAD["gate"]):
            return []
        logits_TE, index_TK = self._routers[later].routed(call.x_TH)
        scores = self._scorers[later](logits_TE)
        own = Routed(
            index_TK=index_TK,
            weight_TK=call.weight_TK,
            scores=scores,
            alpha=lane.alpha,
            max_weight=self._options.max_weight,
        )
        return [replace(choice, experts=tuple(sorted(forecast)) or choice.experts) for choice in choices_of(own)]
