"""Which node computes which expert of which call, until every call is complete. Pure: no socket, clock or tensor.

Knows the forecasts the predictor announced, so that a forecast expert is computed where it was loaded. A request that
is late or whose node is lost is sent to another node as well; the first answer wins. Workers hold no sequence state, so
it does not matter who computes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from odmoe_server.cluster.events import Action, CallFailed, LayerCall, PartDone, Send, SendCompute
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.prompt_loads import PromptLoads, deal
from odmoe_wire.homes import homes, placed
from odmoe_wire.messages import Compute, Member, Release, Result, Rollback, Schedule, Span
from odmoe_wire.placement import group_of, place

# A request is late after this many times what such a request has taken lately.
LATE_FACTOR = 8.0
# Fewer rows of a prompt are not worth a message of their own.
PARCEL_ROWS = 32
MAX_REMEMBERED_SEQUENCES = 1024


@dataclass(kw_only=True)
class _Call:
    call: LayerCall
    deadline_s: float
    open_experts: set[int]
    predicted: frozenset[int]
    # Nodes an expert was sent to, oldest first: a second try goes to a node not yet tried, if there is one.
    tried: dict[int, list[str]] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Request:
    call_id: int
    peer_id: str
    experts: tuple[int, ...]
    sent_s: float
    late_s: float
    hedged: bool = False


@dataclass(kw_only=True)
class Dispatch:
    """All calls in progress. Every method returns what is to be done."""

    config: ClusterConfig
    calls: dict[int, _Call] = field(default_factory=dict)
    requests: dict[int, _Request] = field(default_factory=dict)
    # (sequence, position) -> layer -> forecast experts
    forecasts: dict[tuple[int, int], dict[int, frozenset[int]]] = field(default_factory=dict)
    # The same for what the gate chose and no forecast had named, to judge forecasts that come after it has spoken.
    unforeseen: dict[tuple[int, int], dict[int, frozenset[int]]] = field(default_factory=dict)
    predicted_late_total: int = 0
    failovers_total: int = 0
    duplicates_total: int = 0
    prompt_loads: PromptLoads = field(init=False)
    # Sequences that are over, oldest first: the predictor may be ahead of the news.
    _ended: dict[int, None] = field(default_factory=dict)
    _last_request_id: int = 0
    _typical_row_s: float = 0.0
    _typical_expert_s: float = 0.0
    # When each node's last result came: what was sent to it together is done one after the other.
    _last_result_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt_loads = PromptLoads(config=self.config)

    # -------------------------------------------------------------------------------------------- forecasts

    def forecast(self, schedule: Schedule) -> None:
        """Remember what the predictor told the nodes, the newest forecast of a position and layer in place of older
        ones; once the gate has spoken, only count what was right and is news."""
        if schedule.span.sequence in self._ended:
            return
        key = (schedule.span.sequence, schedule.span.position)
        layers = self.unforeseen.get(key, {})
        if schedule.layer in layers:
            named = layers[schedule.layer] & frozenset(schedule.experts)
            layers[schedule.layer] -= named
            self.predicted_late_total += len(named)
            return
        self.forecasts.setdefault(key, {})[schedule.layer] = frozenset(schedule.experts)

    def rollback(self, message: Rollback) -> None:
        """The predictor had gone on with a wrong token: what it forecast from there on is void."""
        for key in [key for key in self.forecasts if key[0] == message.sequence and key[1] >= message.position]:
            del self.forecasts[key]

    def forget(self, sequence: int) -> None:
        """The sequence is over."""
        self.prompt_loads.forget(sequence)
        self.forecasts = {key: value for key, value in self.forecasts.items() if key[0] != sequence}
        self.unforeseen = {key: value for key, value in self.unforeseen.items() if key[0] != sequence}
        self._ended[sequence] = None
        if len(self._ended) > MAX_REMEMBERED_SEQUENCES:
            del self._ended[next(iter(self._ended))]

    def predicted(self, spans: Iterable[Span], layer: int) -> frozenset[int]:
        """Union of the spans' forecasts for a layer; empty when none has come."""
        found = (self.forecasts.get((span.sequence, span.position), {}).get(layer, frozenset()) for span in spans)
        return frozenset().union(*found)

    # ------------------------------------------------------------------------------------------------ calls

    def begin_prompt(self, spans: tuple[Span, ...], members: list[Member], *, epoch: int) -> list[Action]:
        """A prompt is about to go through the model."""
        return self.prompt_loads.begin(spans, members, epoch=epoch)

    def begin(self, call: LayerCall, members: list[Member], *, epoch: int, now: float) -> list[Action]:
        """Send a call's experts to the nodes. Without any node the call waits for one until its deadline."""
        self._drop_passed(call.spans)
        deadline_s = now + self.config.call_timeout_s
        predicted = frozenset() if call.is_prompt else self.predicted(call.spans, call.layer)
        self.calls[call.call_id] = _Call(
            call=call, deadline_s=deadline_s, open_experts=set(call.counts), predicted=predicted
        )
        assigned = assign(call, predicted, members, self.config)
        actions = self._send(call.call_id, assigned, epoch=epoch, now=now)
        if call.is_prompt:
            return actions + self.prompt_loads.after(call, members, epoch=epoch)
        for span in call.spans:
            unforeseen = frozenset(call.counts) - predicted
            self.unforeseen.setdefault((span.sequence, span.position), {})[call.layer] = unforeseen
        return actions + self._release(call, predicted, members, used=set(assigned.values()), epoch=epoch)

    def abandon(self, call_id: int) -> None:
        """Nobody waits for the call any more."""
        self.calls.pop(call_id, None)
        self._drop_requests(call_id)

    def result(self, peer_id: str, result: Result, *, now: float) -> list[Action]:
        """Rows came back. An answer nobody waits for is counted and dropped."""
        request = self.requests.get(result.request_id)
        if request is None or request.peer_id != peer_id:
            self.duplicates_total += 1
            return []
        del self.requests[result.request_id]
        state = self.calls[request.call_id]
        counts = tuple(state.call.counts[expert] for expert in request.experts)
        began_s = max(request.sent_s, self._last_result_s.get(peer_id, 0.0))
        self._last_result_s[peer_id] = now
        self._learn(result, sum(counts), took_s=now - began_s)
        wanted = frozenset(request.experts) & state.open_experts
        state.open_experts -= wanted
        if not wanted:
            self.duplicates_total += 1
            return []
        last = not state.open_experts
        if last:
            self.abandon(request.call_id)
        return [
            PartDone(
                call_id=request.call_id,
                experts=request.experts,
                counts=counts,
                wanted=wanted,
                timings=tuple(result.timings),
                last=last,
            )
        ]

    def refused(self, request_id: int, members: list[Member], *, epoch: int, now: float) -> list[Action]:
        """A node could not serve a request; another one has to."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return []
        return self._again(request, members, epoch=epoch, now=now)

    def node_lost(self, peer_id: str, members: list[Member], *, epoch: int, now: float) -> list[Action]:
        """Send what the lost node had in hand to others. `members` are those that are left."""
        self._last_result_s.pop(peer_id, None)
        orphans = [key for key, request in self.requests.items() if request.peer_id == peer_id]
        actions: list[Action] = []
        for request_id in orphans:
            actions += self.refused(request_id, members, epoch=epoch, now=now)
        return actions

    def tick(self, members: list[Member], *, epoch: int, now: float) -> list[Action]:
        """Hedge what is late, place what had no node, give up what is past its deadline."""
        actions: list[Action] = []
        for call_id in [key for key, state in self.calls.items() if now >= state.deadline_s]:
            self.abandon(call_id)
            actions.append(CallFailed(call_id=call_id, reason="no node agent could compute an expert in time"))
        for request in [r for r in self.requests.values() if now >= r.late_s and not r.hedged]:
            request.hedged = True
            actions += self._again(request, members, epoch=epoch, now=now)
        for call_id, state in self.calls.items():
            unsent = state.open_experts - self._in_flight(call_id)
            if unsent and members:
                assigned = {expert: self._next_node(state, expert, members) for expert in sorted(unsent)}
                actions += self._send(call_id, assigned, epoch=epoch, now=now)
        return actions

    # ---------------------------------------------------------------------------------------------- insides

    def _again(self, request: _Request, members: list[Member], *, epoch: int, now: float) -> list[Action]:
        state = self.calls[request.call_id]
        elsewhere = self._in_flight(request.call_id, but=request)
        missing = [e for e in request.experts if e in state.open_experts and e not in elsewhere]
        if not missing or not members:
            return []
        self.failovers_total += 1
        assigned = {expert: self._next_node(state, expert, members) for expert in missing}
        return self._send(request.call_id, assigned, epoch=epoch, now=now)

    def _next_node(self, state: _Call, expert: int, members: list[Member]) -> str:
        """A node the expert was not sent to yet, of the layer's group first; else the one tried longest ago."""
        tried = state.tried.get(expert, [])
        group = group_of(state.call.layer, members, self.config.group_size, self.config.num_layers)
        order = [*group, *(member for member in members if member not in group)]
        fresh = next((member.node_id for member in order if member.node_id not in tried), None)
        if fresh is not None:
            return fresh
        return min((member.node_id for member in order), key=lambda node_id: _last_index(tried, node_id))

    def _send(self, call_id: int, assigned: dict[int, str], *, epoch: int, now: float) -> list[Action]:
        """One compute to each node that got experts; of a prompt one for each expert with enough rows, so that a node's
        rows come back while it computes its next."""
        state = self.calls[call_id]
        by_node: dict[str, list[int]] = {}
        for expert in sorted(assigned):
            by_node.setdefault(assigned[expert], []).append(expert)
            state.tried.setdefault(expert, []).append(assigned[expert])
        actions: list[Action] = []
        queued: dict[str, tuple[int, int]] = {}  # node -> experts and rows it was sent here
        for peer_id, experts in _parcels(by_node, state.call.counts) if state.call.is_prompt else by_node.items():
            counts = [state.call.counts[expert] for expert in experts]
            num_experts, num_rows = queued.get(peer_id, (0, 0))
            queued[peer_id] = num_experts + len(experts), num_rows + sum(counts)
            patience_s = self._patience_s(*queued[peer_id])
            self._last_request_id += 1
            self.requests[self._last_request_id] = _Request(
                call_id=call_id, peer_id=peer_id, experts=tuple(experts), sent_s=now, late_s=now + patience_s
            )
            compute = Compute(
                request_id=self._last_request_id,
                spans=list(state.call.spans),
                layer=state.call.layer,
                experts=experts,
                counts=counts,
                ttl_s=max(0.001, state.deadline_s - now),
            )
            actions.append(SendCompute(peer_id=peer_id, message=compute, epoch=epoch, call_id=call_id))
        return actions

    def _release(
        self, call: LayerCall, predicted: frozenset[int], members: list[Member], *, used: set[str], epoch: int
    ) -> list[Action]:
        """Tell the nodes that loaded only wrong experts for this layer that they may free them. The whole group is
        told, since a forecast may have reached a node and not us yet."""
        group_size, mode, num_layers = self.config.group_size, self.config.mode, self.config.num_layers
        where = placed(call.layer, predicted, members, group_size, mode=mode, num_layers=num_layers)
        holders = set(where.values())
        if mode == "on-demand":
            holders |= {member.node_id for member in group_of(call.layer, members, group_size, num_layers)}
        release = Release(spans=list(call.spans), layer=call.layer)
        return [Send(peer_id=node_id, message=release, epoch=epoch) for node_id in sorted(holders - used)]

    def _in_flight(self, call_id: int, *, but: _Request | None = None) -> set[int]:
        """Experts of the call that some node is at work on."""
        return {e for r in self.requests.values() if r.call_id == call_id and r is not but for e in r.experts}

    def _drop_requests(self, call_id: int) -> None:
        self.requests = {key: r for key, r in self.requests.items() if r.call_id != call_id}

    def _drop_passed(self, spans: Iterable[Span]) -> None:
        """Forecasts for positions the decode loop has left behind are of no use."""
        now_at = {span.sequence: span.position for span in spans}
        passed = [key for key in self.forecasts if key[1] < now_at.get(key[0], 0)]
        for key in passed:
            del self.forecasts[key]
        # One position longer, so that the last forecasts of a token can still be judged.
        for key in [key for key in self.unforeseen if key[1] < now_at.get(key[0], 0) - 1]:
            del self.unforeseen[key]

    def _learn(self, result: Result, num_rows: int, *, took_s: float) -> None:
        """Moving averages of what requests take, for deadlines."""
        compute_s = sum(timing.compute_s for timing in result.timings)
        rest_s = max(0.0, took_s - compute_s)
        self._typical_row_s += 0.1 * (compute_s / max(1, num_rows) - self._typical_row_s)
        self._typical_expert_s += 0.1 * (rest_s / max(1, len(result.timings)) - self._typical_expert_s)

    def _patience_s(self, num_experts: int, num_rows: int) -> float:
        expected_s = self._typical_expert_s * num_experts + self._typical_row_s * num_rows
        return min(self.config.compute_cap_s, self.config.compute_floor_s + LATE_FACTOR * expected_s)


def assign(call: LayerCall, predicted: frozenset[int], members: list[Member], config: ClusterConfig) -> dict[int, str]:
    """Expert -> node for the experts the gate chose.

    A forecast expert goes where placement had it loaded, any other to the worker of the layer's group with the
    least to do, which is the one whose forecast was wrong, if one was. With no forecast and more experts than the
    group has workers (a prompt), the experts are dealt round all workers. Where slots are caches, each goes home.
    """
    needed, group_size = sorted(call.counts), config.group_size
    if not members:
        return {}
    if config.mode == "lru":
        return homes(call.layer, needed, members)
    if not predicted and len(needed) > group_size:
        return deal(call.layer, needed, members, config)
    where = place(call.layer, predicted or needed, members, group_size, config.num_layers)
    assigned = {expert: where[expert] for expert in needed if expert in where}
    work = {member.node_id: 0 for member in group_of(call.layer, members, group_size, config.num_layers)}
    for node_id in assigned.values():
        work[node_id] += 1
    for expert in needed:
        if expert not in assigned:
            assigned[expert] = min(work, key=lambda node_id: work[node_id])
            work[assigned[expert]] += 1
    return assigned


def _parcels(by_node: Mapping[str, list[int]], counts: Mapping[int, int]) -> list[tuple[str, list[int]]]:
    """What goes out in one message each: as few experts of a node as have `PARCEL_ROWS` rows together. Every node gets
    its first before any gets its second."""
    cut: list[list[tuple[str, list[int]]]] = []
    for node_id, experts in by_node.items():
        parcels: list[list[int]] = []
        room = 0
        for expert in experts:
            if room <= 0:
                parcels.append([])
                room = PARCEL_ROWS
            parcels[-1].append(expert)
            room -= counts[expert]
        cut.append([(node_id, parcel) for parcel in parcels])
    return [parcel for turn in zip_longest(*cut) for parcel in turn if parcel is not None]


def _last_index(tried: list[str], node_id: str) -> int:
    return len(tried) - 1 - tried[::-1].index(node_id)
