"""Which node computes which expert of which call, until every call is complete. Pure: no socket, clock or tensor.

Knows the forecasts the predictor announced, so that a forecast expert is computed where it was loaded. A request that
is late or whose node is lost is sent to another node as well; the first answer wins. Workers hold no sequence state, so
it does not matter who computes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from odmoe_server.cluster.events import Action, CallFailed, FetchAhead, LayerCall, PartDone, Send, SendCompute
from odmoe_server.cluster.lateness import Lateness
from odmoe_server.cluster.ledger import Ledger
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.prompt_loads import PromptLoads, deal
from odmoe_server.cluster.suspects import Suspects
from odmoe_wire.homes import homes, placed
from odmoe_wire.messages import Compute, Load, Member, Release, Result, Rollback, Schedule, Span, Withdraw
from odmoe_wire.placement import group_of, place
from odmoe_wire.sharing import Sharing

# Fewer rows of a prompt are not worth a message of their own. Two nodes and the server on one core, 128 tokens: 2.57 s
# to the first token with a message an expert, 2.61 with these, 2.65 with one for all.
PARCEL_ROWS = 32
MAX_REMEMBERED_SEQUENCES = 1024
# What two nodes have not answered for is asked of so many at once.
COPIES = 2


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
    expected_s: float
    late_s: float
    hedged: bool = False


@dataclass(kw_only=True)
class Dispatch:
    """All calls in progress. Every method returns what is to be done."""

    config: ClusterConfig
    ledger: Ledger
    calls: dict[int, _Call] = field(default_factory=dict)
    requests: dict[int, _Request] = field(default_factory=dict)
    # (sequence, position) -> layer -> forecast experts
    forecasts: dict[tuple[int, int], dict[int, frozenset[int]]] = field(default_factory=dict)
    # The same for what the gates chose and no forecast had named, to judge forecasts that come after they have spoken;
    # one set for all spans of a step, since its experts are counted once.
    unforeseen: dict[tuple[int, int], dict[int, set[int]]] = field(default_factory=dict)
    predicted_late_total: int = 0
    failovers_total: int = 0
    duplicates_total: int = 0
    prompt_loads: PromptLoads = field(init=False)
    suspects: Suspects = field(init=False)
    lateness: Lateness = field(init=False)
    sharing: Sharing = field(default_factory=Sharing)
    # Layers that were fetched ahead and whose gates have not spoken, with the nodes that were told so.
    _fetched: dict[int, set[str]] = field(default_factory=dict)
    # Where the latest step has begun with each sequence.
    _at: dict[int, int] = field(default_factory=dict)
    # Sequences that are over, oldest first: the predictor may be ahead of the news.
    _ended: dict[int, None] = field(default_factory=dict)
    _last_request_id: int = 0
    # When each node's last result came: what was sent to it together is done one after the other.
    _last_result_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt_loads = PromptLoads(config=self.config)
        config = self.config
        self.suspects = Suspects(first_away_s=config.compute_floor_s)
        # In mode "importance" what is late may first be replaced (`importance/mode.py`), before it is asked for twice.
        least_s = config.compute_floor_s if config.mode == "importance" else config.compute_least_s
        self.lateness = Lateness(least_s=least_s, most_s=config.compute_floor_s, cap_s=config.compute_cap_s)

    # -------------------------------------------------------------------------------------------- forecasts

    def forecast(self, schedule: Schedule, members: list[Member]) -> None:
        """Remember what the predictor told the nodes, the newest forecast of a position and layer in place of older
        ones; once the gate has spoken, only count what was right and is news."""
        self._deal(schedule, members)
        if schedule.span.sequence in self._ended:
            return
        key = (schedule.span.sequence, schedule.span.position)
        layers = self.unforeseen.get(key, {})
        if schedule.layer in layers:
            named = layers[schedule.layer].intersection(schedule.experts)
            layers[schedule.layer] -= named
            self.predicted_late_total += len(named)
            return
        self.forecasts.setdefault(key, {})[schedule.layer] = frozenset(schedule.experts)

    def _deal(self, schedule: Schedule, members: list[Member]) -> None:
        """As the predictor deals: each forecast in its turn, of whatever is over too."""
        config = self.config
        if config.mode == "on-demand" and config.placing == "span":
            self.sharing.deal(
                schedule.span,
                schedule.layer,
                schedule.experts,
                members,
                group_size=config.group_size,
                num_layers=config.num_layers,
            )

    def rollback(self, message: Rollback) -> None:
        """The predictor had gone on with a wrong token: what it forecast from there on is void. If the step had taken
        that token as a guess, the decode loop goes back to it, and its gates have yet to speak."""
        sequence, position = message.sequence, message.position
        for key in [key for key in self.forecasts if key[0] == sequence and key[1] >= position]:
            del self.forecasts[key]
        if self._at.get(sequence, position) < position:
            for key in [key for key in self.unforeseen if key[0] == sequence and key[1] >= position]:
                del self.unforeseen[key]

    def forget(self, sequence: int) -> None:
        """The sequence is over."""
        self.prompt_loads.forget(sequence)
        self.forecasts = {key: value for key, value in self.forecasts.items() if key[0] != sequence}
        self.unforeseen = {key: value for key, value in self.unforeseen.items() if key[0] != sequence}
        self._at.pop(sequence, None)
        self._ended[sequence] = None
        if len(self._ended) > MAX_REMEMBERED_SEQUENCES:
            del self._ended[next(iter(self._ended))]

    def forget_forecasts(self) -> None:
        """None counts any more, and those to come are news."""
        self.forecasts.clear()
        self.unforeseen.clear()
        self.sharing.clear()

    def predicted(self, spans: Iterable[Span], layer: int) -> frozenset[int]:
        """Union of the spans' forecasts for a layer; empty when none has come."""
        return frozenset().union(*self._forecast_of_each(spans, layer))

    def _forecast_of_each(self, spans: Iterable[Span], layer: int) -> list[frozenset[int]]:
        """Of the spans whose forecast has come and names any."""
        found = (self.forecasts.get((span.sequence, span.position), {}).get(layer) for span in spans)
        return [experts for experts in found if experts]

    # ------------------------------------------------------------------------------------------------ calls

    def begin_prompt(self, spans: tuple[Span, ...], members: list[Member], *, epoch: int) -> list[Action]:
        """A prompt is about to go through the model."""
        return self.prompt_loads.begin(spans, members, epoch=epoch)

    def fetch(self, event: FetchAhead, members: list[Member], *, epoch: int) -> list[Action]:
        """Let nodes load experts whose layer's gate has not spoken yet."""
        present = {member.node_id for member in members}
        by_node: dict[str, list[int]] = {}
        for expert, node_id in event.where.items():
            if node_id in present:
                by_node.setdefault(node_id, []).append(expert)
        self._fetched.setdefault(event.layer, set()).update(by_node)
        actions: list[Action] = []
        for node_id, experts in by_node.items():
            leaving = list(event.leaving.get(node_id, ()))
            load = Load(spans=list(event.spans), layer=event.layer, experts=experts, leaving=leaving)
            actions.append(Send(peer_id=node_id, message=load, epoch=epoch))
        return actions

    def begin(self, call: LayerCall, members: list[Member], *, epoch: int, now: float) -> list[Action]:
        """Send a call's experts to the nodes. Without any node the call waits for one until its deadline."""
        self._drop_passed(call.spans)
        deadline_s = now + self.config.call_timeout_s
        forecasts = [] if call.is_prompt else self._forecast_of_each(call.spans, call.layer)
        predicted = frozenset[int]().union(*forecasts)
        self.calls[call.call_id] = _Call(
            call=call, deadline_s=deadline_s, open_experts=set(call.counts), predicted=predicted
        )
        group = group_of(call.layer, members, self.config.group_size, self.config.num_layers)
        dealt = [self.sharing.where(span, call.layer) for span in call.spans] if forecasts else []
        assigned = assign(call, forecasts, members, self.config, dealt=dealt)
        assigned = self.suspects.spared(assigned, members, group=group, now=now)
        actions = self._send(call.call_id, assigned, epoch=epoch, now=now)
        if call.is_prompt:
            return actions + self.prompt_loads.after(call, members, epoch=epoch)
        self.ledger.last = call.spans[0], call.layer
        unforeseen = set(call.counts) - predicted
        for span in call.spans:
            self.unforeseen.setdefault((span.sequence, span.position), {})[call.layer] = unforeseen
        return actions + self._release(call, predicted, members, used=set(assigned.values()), epoch=epoch)

    def suspect(self, call_id: int, *, now: float) -> None:
        """The nodes that have not answered for a call are late."""
        for request in self.requests.values():
            if request.call_id == call_id:
                self.suspects.was_late(request.peer_id, now)

    def abandon(self, call_id: int) -> None:
        """Nobody waits for the call any more."""
        self.calls.pop(call_id, None)
        self._drop_requests(call_id)

    def result(self, peer_id: str, result: Result, *, epoch: int, now: float) -> list[Action]:
        """Rows came back. An answer nobody waits for is counted and dropped; who is at work for nothing is told."""
        request = self.requests.get(result.request_id)
        if request is None or request.peer_id != peer_id:
            self.duplicates_total += 1
            return []
        del self.requests[result.request_id]
        if not request.hedged:
            self.suspects.was_in_time(peer_id)
        state = self.calls[request.call_id]
        counts = tuple(state.call.counts[expert] for expert in request.experts)
        began_s = max(request.sent_s, self._last_result_s.get(peer_id, 0.0))
        self._last_result_s[peer_id] = now
        self.ledger.answered(peer_id, now - request.sent_s)
        self._learn(result, request, num_rows=sum(counts), began_s=began_s, now=now)
        wanted = frozenset(request.experts) & state.open_experts
        state.open_experts -= wanted
        if not wanted:
            self.duplicates_total += 1
            return []
        withdrawn = self._withdraw(request.call_id, state.open_experts, epoch=epoch)
        last = not state.open_experts
        if last:
            self.abandon(request.call_id)
        part = PartDone(
            call_id=request.call_id,
            experts=request.experts,
            counts=counts,
            wanted=wanted,
            timings=tuple(result.timings),
            last=last,
        )
        return [part, *withdrawn]

    def _withdraw(self, call_id: int, open_experts: set[int], *, epoch: int) -> list[Action]:
        """Spare nodes the computes that others were first with."""
        lost = [
            (request_id, request.peer_id)
            for request_id, request in self.requests.items()
            if request.call_id == call_id and open_experts.isdisjoint(request.experts)
        ]
        for request_id, _ in lost:
            del self.requests[request_id]
        return [
            Send(peer_id=peer_id, message=Withdraw(request_id=request_id), epoch=epoch) for request_id, peer_id in lost
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
        self.suspects.forget(peer_id)
        self.lateness.forget(peer_id)
        orphans = [key for key, request in self.requests.items() if request.peer_id == peer_id]
        actions: list[Action] = []
        for request_id in orphans:
            actions += self.refused(request_id, members, epoch=epoch, now=now)
        return actions

    def excuse(self, *, late_s: float, now: float) -> None:
        """We stood still for so long and could not hear anybody: that is neither lateness nor a measure of it."""
        for request in self.requests.values():
            request.sent_s = min(now, request.sent_s + late_s)
            request.late_s += late_s

    def tick(self, members: list[Member], *, epoch: int, now: float) -> list[Action]:
        """Hedge what is late, place what had no node, give up what is past its deadline."""
        actions: list[Action] = []
        for call_id in [key for key, state in self.calls.items() if now >= state.deadline_s]:
            self.abandon(call_id)
            actions.append(CallFailed(call_id=call_id, reason="no node agent could compute an expert in time"))
        for request in [r for r in self.requests.values() if not r.hedged and self._is_late(r, now)]:
            request.hedged = True
            self.suspects.was_late(request.peer_id, now)
            actions += self._again(request, members, epoch=epoch, now=now)
        for call_id, state in self.calls.items():
            unsent = state.open_experts - self._in_flight(call_id)
            if unsent and members:
                assigned = {expert: self._next_node(state, expert, members, now=now) for expert in sorted(unsent)}
                actions += self._send(call_id, assigned, epoch=epoch, now=now)
        return actions

    # ---------------------------------------------------------------------------------------------- insides

    def _again(self, request: _Request, members: list[Member], *, epoch: int, now: float) -> list[Action]:
        state = self.calls[request.call_id]
        # What is late already counts as lost: it may be, and then nobody else would ever be asked.
        others = (r for r in self.requests.values() if r.call_id == request.call_id and r is not request)
        elsewhere = {expert for other in others if not other.hedged for expert in other.experts}
        missing = [e for e in request.experts if e in state.open_experts and e not in elsewhere]
        if not missing or not members:
            return []
        self.failovers_total += 1
        actions: list[Action] = []
        # Twice lost on the way, or at two nodes that fail: then two at once, or it may go on for long.
        for _ in range(min(COPIES, len(members)) if len(state.tried[missing[0]]) > 1 else 1):
            assigned = {expert: self._next_node(state, expert, members, now=now) for expert in missing}
            actions += self._send(request.call_id, assigned, epoch=epoch, now=now)
        return actions

    def _is_late(self, request: _Request, now: float) -> bool:
        """A node nothing is heard of is not waited for as long as one that is at work."""
        is_silent = self.suspects.is_silent(request.peer_id)
        return now >= (request.sent_s + self.config.compute_floor_s if is_silent else request.late_s)

    def _next_node(self, state: _Call, expert: int, members: list[Member], *, now: float) -> str:
        """A node the expert was not sent to yet, suspects last, of the layer's group first; else the one tried longest
        ago."""
        tried = state.tried.get(expert, [])
        group = group_of(state.call.layer, members, self.config.group_size, self.config.num_layers)
        suspects = self.suspects.among(members, now)
        order = [*group, *(member for member in members if member not in group)]
        order.sort(key=lambda member: member.node_id in suspects)
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
            tries = max(len(state.tried[expert]) for expert in experts) - 1
            self._last_request_id += 1
            self.requests[self._last_request_id] = _Request(
                call_id=call_id,
                peer_id=peer_id,
                experts=tuple(experts),
                sent_s=now,
                expected_s=self.lateness.expected_s(*queued[peer_id]),
                late_s=now + self.lateness.late_after_s(*queued[peer_id], tries=tries, now=now),
            )
            compute = Compute(
                request_id=self._last_request_id,
                spans=list(state.call.spans),
                layer=state.call.layer,
                experts=experts,
                counts=counts,
                ttl_s=max(0.001, state.deadline_s - now),
                runs=_runs(state.call, experts),
                leaving=list(state.call.leaving.get(peer_id, ())),
            )
            actions.append(SendCompute(peer_id=peer_id, message=compute, epoch=epoch, call_id=call_id))
        return actions

    def _release(
        self, call: LayerCall, predicted: frozenset[int], members: list[Member], *, used: set[str], epoch: int
    ) -> list[Action]:
        """Tell the nodes that loaded only wrong experts for this layer that they may free them. The whole group is
        told, since a forecast may have reached a node and not us yet."""
        config = self.config
        holders = set(_placed(call.layer, predicted, members, config).values())
        if config.mode == "on-demand":
            group = group_of(call.layer, members, config.group_size, config.num_layers)
            holders |= {member.node_id for member in group}
        holders |= self._fetched.pop(call.layer, set()).intersection(member.node_id for member in members)
        release = Release(spans=list(call.spans), layer=call.layer)
        return [Send(peer_id=node_id, message=release, epoch=epoch) for node_id in sorted(holders - used)]

    def _in_flight(self, call_id: int) -> set[int]:
        """Experts of the call that some node is at work on."""
        return {expert for r in self.requests.values() if r.call_id == call_id for expert in r.experts}

    def _drop_requests(self, call_id: int) -> None:
        self.requests = {key: r for key, r in self.requests.items() if r.call_id != call_id}

    def _drop_passed(self, spans: Iterable[Span]) -> None:
        """Once in each step: forecasts for positions the decode loop has left behind are of no use."""
        now_at: dict[int, int] = {}
        for span in spans:
            now_at[span.sequence] = min(span.position, now_at.get(span.sequence, span.position))
        for sequence, position in now_at.items():
            before = self._at.get(sequence, position)
            if before == position and sequence in self._at:
                continue
            self._at[sequence] = position
            for key in [key for key in self.forecasts if key[0] == sequence and key[1] < position]:
                del self.forecasts[key]
            # One step longer, so that its last forecasts can still be judged; but not those of guesses it went back on.
            for key in [key for key in self.unforeseen if key[0] == sequence and not before <= key[1] < position]:
                del self.unforeseen[key]

    def _learn(self, result: Result, request: _Request, *, num_rows: int, began_s: float, now: float) -> None:
        """What an answer says of how long to wait for others."""
        self.lateness.loaded(loaded.load_s for loaded in result.loaded)
        took_s = now - request.sent_s
        self.lateness.answered(request.peer_id, took_s=took_s, expected_s=request.expected_s, now=now)
        compute_s = sum(timing.compute_s for timing in result.timings)
        self.lateness.learn(len(result.timings), num_rows, compute_s=compute_s, took_s=now - began_s)


def assign(
    call: LayerCall,
    forecasts: Sequence[frozenset[int]],
    members: list[Member],
    config: ClusterConfig,
    *,
    dealt: Sequence[Mapping[int, str]] = (),
) -> dict[int, str]:
    """Expert -> node for the experts the gate chose, given what was forecast of each span, and where `Sharing` has it.

    A forecast expert goes where placement had it loaded, any other to the worker of the layer's group with the
    least to do, which is the one whose forecast was wrong, if one was. With no forecast and more experts than the
    group has workers (a prompt), the experts are dealt round all workers. Where slots are caches, each goes home; where
    an expert has its place whatever else is needed, each goes there, forecast or not. In mode "importance" the call
    says where, as far as those nodes are there still.
    """
    needed, group_size = sorted(call.counts), config.group_size
    if not members:
        return {}
    if config.mode == "importance":
        said = {expert: node_id for expert, node_id in call.where.items() if any(node_id == m.node_id for m in members)}
        return {expert: said.get(expert, at_home) for expert, at_home in homes(call.layer, needed, members).items()}
    if not forecasts and len(needed) > group_size:
        return deal(call.layer, needed, members, config)
    if config.mode == "lru" or config.placing == "expert":
        return _placed(call.layer, needed, members, config)
    where: dict[int, str] = {}
    for experts in forecasts or [frozenset(needed)]:
        where = place(call.layer, experts, members, group_size, config.num_layers) | where
    for told in dealt:
        where |= told
    assigned = {expert: where[expert] for expert in needed if expert in where}
    work = {member.node_id: 0 for member in group_of(call.layer, members, group_size, config.num_layers)}
    for node_id in assigned.values():
        work[node_id] += 1
    for expert in needed:
        if expert not in assigned:
            assigned[expert] = min(work, key=lambda node_id: work[node_id])
            work[assigned[expert]] += 1
    return assigned


def _placed(layer: int, experts: Iterable[int], members: list[Member], config: ClusterConfig) -> dict[int, str]:
    """Expert -> node, as the predictor has it from its view."""
    return placed(
        layer,
        experts,
        members,
        config.group_size,
        mode=config.mode,
        num_layers=config.num_layers,
        placing=config.placing,
    )


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


def _runs(call: LayerCall, experts: Iterable[int]) -> list[int]:
    """How the experts' rows are cut; empty where each expert's rows belong together."""
    if not any(len(call.runs.get(expert, ())) > 1 for expert in experts):
        return []
    return [length for expert in experts for length in call.runs[expert]]


def _last_index(tried: list[str], node_id: str) -> int:
    return len(tried) - 1 - tried[::-1].index(node_id)
