"""A whole cluster on one thread and in virtual time: real model, real cores and drivers, links in memory.

Nothing sleeps: when nobody has anything to do, the clock jumps. Faults are the network's (`odmoe_wire.loopback`) or a
node's (`pause`). The same script gives the same run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from odmoe_model.store import ExpertStore
from odmoe_node.bank import open_bank
from odmoe_node.driver import NodeAgent
from odmoe_predictor.driver import Predictor
from odmoe_predictor.rivals.base import Rival
from odmoe_predictor.shadow import Shadow
from odmoe_predictor.switchboard import FromNode, FromServer
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.cluster.state import ClusterState
from odmoe_server.engine.build import EngineOptions, cluster_config, load_model
from odmoe_server.engine.rota import Rota
from odmoe_server.engine.sampling import Sampler
from odmoe_server.engine.sequence import Outbox
from odmoe_server.engine.sequence import Sequence as Generation
from odmoe_server.engine_api import ExpertStats, GenerationRequest, Sampling
from odmoe_server.moe.tally import Tally
from odmoe_server.moe.trace import RoutedCall
from odmoe_wire.link import Link
from odmoe_wire.loopback import LoopbackNetwork
from odmoe_wire.messages import ToNode, ToServer
from support.cluster import limits_of, node_hello, predictor_hello

# Virtual seconds that pass when nobody has anything to do.
IDLE_STEP_S = 0.01
MAX_IDLE_STEPS = 100_000


@dataclass
class Paused:
    """A role that may be stopped as SIGSTOP stops a process."""

    pump: Callable[[float], bool]
    paused: bool = False


@dataclass
class LoopbackCluster:
    """`start` the roles wanted, then `generate`. Options as for a real server."""

    store: ExpertStore
    options: EngineOptions = field(default_factory=lambda: EngineOptions(endpoint="inproc://unused"))
    network: LoopbackNetwork = field(default_factory=LoopbackNetwork)
    roles: dict[str, Paused] = field(default_factory=dict)
    agents: dict[str, NodeAgent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        link = self.network.router("server", accept=ToServer, limits=limits_of(self.store))
        self.state = ClusterState(config=cluster_config(self.store, self.options))
        self.driver = ClusterDriver(self.state, link=link, clock=self.network.clock, pump_while_waiting=self.turn)
        self.roles["server"] = Paused(self.driver.pump)
        self._loaded = load_model(self.store, self.options, cluster=self.driver, trace=self._traced)
        self.trace: Callable[[RoutedCall], None] = lambda routed: None
        self._sequence_id = 0
        self._on_turn: list[Callable[[], None]] = []

    # ------------------------------------------------------------------------------------------------- the roles

    def add_node(self, peer_id: str, *, slots: int = 1, predictor: bool = False, load_us: int = 0) -> NodeAgent:
        """A node agent that computes where it is pumped; `load_us` is what it says a load takes it."""

        def dealer(peer: str) -> Link:
            return self.network.dealer(peer_id, peer, accept=ToNode, limits=limits_of(self.store))

        agent = NodeAgent(
            node_hello(self.store, peer_id=peer_id, slots=slots, load_us=load_us),
            bank=open_bank(self.store, num_slots=slots, device="cpu"),
            server=dealer("server"),
            predictor=dealer("predictor") if predictor else None,
            clock=self.network.clock,
            threads=False,
        )
        self.agents[peer_id] = agent
        self.roles[peer_id] = Paused(agent.pump)
        return agent

    def add_predictor(
        self,
        *,
        wrap: Callable[[Link], Link] = lambda link: link,
        run_ahead: int = 0,
        rival: Rival | None = None,
        **shadow: Any,
    ) -> Predictor:
        """A shadow, int8 unless `shadow` says otherwise, or a rival in its place, that computes where it is pumped;
        `wrap` may put a fault in front of its links."""
        limits = limits_of(self.store)
        self._predictor_link = self.network.router("predictor", accept=FromNode, limits=limits)
        predictor = Predictor(
            predictor_hello(self.store),
            Shadow.load(self.store, **shadow) if rival is None else rival,
            server=wrap(self.network.dealer("predictor", "server", accept=FromServer, limits=limits)),
            nodes=wrap(self._predictor_link),
            num_layers=self.store.manifest.num_moe_layers,
            run_ahead=run_ahead,
            clock=self.network.clock,
        )
        self.predictor = predictor
        self.roles["predictor"] = Paused(predictor.pump)
        return predictor

    def kill(self, peer_id: str) -> None:
        """The process is gone: it does nothing any more and its connections are closed."""
        del self.roles[peer_id]
        self.agents.pop(peer_id, None)
        for other in ("server", "predictor"):
            self.network.cut(peer_id, other)

    def kill_predictor(self) -> None:
        """Its process is gone, its sockets closed."""
        del self.roles["predictor"]
        self._predictor_link.close()
        self.network.cut("predictor", "server")

    def revive_predictor(self) -> Predictor:
        """A new process in its place, with an empty shadow."""
        self.network.heal("predictor", "server")
        return self.add_predictor()

    def revive(self, peer_id: str, *, slots: int = 1, predictor: bool = False) -> NodeAgent:
        """A new process under the old name."""
        for other in ("server", "predictor"):
            self.network.heal(peer_id, other)
        return self.add_node(peer_id, slots=slots, predictor=predictor)

    # --------------------------------------------------------------------------------------------------- the time

    def turn(self) -> None:
        """Let every role do what waits for it; if nobody has anything to do, let time pass."""
        now = self.network.clock()
        busy = [role.pump(now) for role in list(self.roles.values()) if not role.paused]
        if not any(busy):
            self.network.advance(IDLE_STEP_S)
        for hook in list(self._on_turn):
            hook()

    def until(self, condition: Callable[[], bool]) -> None:
        """Turn until something holds."""
        for _ in range(MAX_IDLE_STEPS):
            if condition():
                return
            self.turn()
        raise AssertionError(f"it never came to that; the story: {list(self.state.story)[-20:]}")

    def settle(self, *, seconds: float) -> None:
        """Turn until so much virtual time has passed."""
        end_s = self.network.clock() + seconds
        self.until(lambda: self.network.clock() >= end_s)

    def each_turn(self, hook: Callable[[], None]) -> None:
        """Call something after every turn, to let faults happen in the midst of a layer."""
        self._on_turn.append(hook)

    def await_members(self, *peer_ids: str) -> None:
        """Until exactly these take part."""
        self.until(lambda: sorted(self.state.peers.admitted) == sorted(peer_ids))

    # ------------------------------------------------------------------------------------------------ generating

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        on_token: Callable[[int], None] = lambda count: None,
        on_logits: Callable[[torch.Tensor], None] = lambda logits_V: None,
    ) -> tuple[list[int], ExpertStats]:
        """Greedy tokens, end tokens ignored; `on_token` hears how many there are after each, `on_logits` what each is
        chosen from."""
        generation = self._generation(prompt_ids, max_tokens)
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            if not generation.is_prompt:
                self._loaded.stepper.draft(generation, most=self.options.draft)
            (rows,) = self._loaded.stepper.step([generation])
            before = len(generation.ids)
            self._loaded.stepper.take(generation, rows)
            if generation.is_prompt:
                continue
            for logits_V in rows[: len(generation.ids) - before]:
                on_logits(logits_V)
            tokens = generation.ids[len(prompt_ids) :]
            on_token(len(tokens))
        self.driver.end_sequence(generation.sequence_id)
        return tokens, generation.decode_tally.stats()

    @property
    def total(self) -> Tally:
        """Counts of all generations."""
        return self._loaded.total

    def _traced(self, routed: RoutedCall) -> None:
        self.trace(routed)

    def generate_together(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, by_layer: bool = False
    ) -> tuple[list[list[int]], list[list[torch.Tensor]]]:
        """Greedy tokens of several sequences decoded together, and the logits_V each was chosen from. Each joins a step
        after the one before; with `by_layer` a step with answers comes behind every layer of a prompt."""
        waiting = [self._generation(prompt_ids, max_tokens) for prompt_ids in prompts]
        everybody, running = list(waiting), list[Generation]()
        logits: dict[int, list[torch.Tensor]] = {generation.sequence_id: [] for generation in waiting}
        rota = Rota(chunk=self.options.prefill_chunk, draft=self.options.draft)
        while waiting or running:
            running += [waiting.pop(0)] if waiting else []
            batch = rota.next_batch(running)
            if by_layer and batch[0].is_prompt:
                brought = self._by_layer(batch, running, logits)
            else:
                brought = self._step_of(batch, num_drafts=rota.num_drafts(len(batch)))
            self._take(batch, brought, running, logits)
        tokens = [each.ids[len(each.request.prompt_ids) :] for each in everybody]
        return tokens, [logits[each.sequence_id] for each in everybody]

    def _step_of(self, batch: Sequence[Generation], *, num_drafts: int = 0) -> list[list[torch.Tensor]]:
        for generation in batch:
            if not generation.is_prompt:
                self._loaded.stepper.draft(generation, most=num_drafts)
        return self._loaded.stepper.step(batch)

    def _by_layer(
        self, batch: Sequence[Generation], running: list[Generation], logits: dict[int, list[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        layers = self._loaded.stepper.step_by_layer(batch)
        while True:
            try:
                next(layers)
            except StopIteration as done:
                brought: list[list[torch.Tensor]] = done.value
                return brought
            if answers := [generation for generation in running if not generation.is_prompt]:
                self._take(answers, self._step_of(answers), running, logits)

    def _take(
        self,
        batch: Sequence[Generation],
        brought: Sequence[list[torch.Tensor]],
        running: list[Generation],
        logits: dict[int, list[torch.Tensor]],
    ) -> None:
        for generation, rows in zip(batch, brought, strict=True):
            before = len(generation.ids)
            self._loaded.stepper.take(generation, rows)
            logits[generation.sequence_id] += rows[: len(generation.ids) - before]
            if generation.finish_reason is not None:
                running.remove(generation)
                self.driver.end_sequence(generation.sequence_id)

    def _generation(self, prompt_ids: Sequence[int], max_tokens: int) -> Generation:
        self._sequence_id += 1
        request = GenerationRequest(
            request_id="test", prompt_ids=tuple(prompt_ids), max_tokens=max_tokens, sampling=Sampling(temperature=0.0)
        )
        generation = Generation(
            sequence_id=self._sequence_id,
            request=request,
            outbox=Outbox(loop=None),  # type: ignore[arg-type]  # nobody listens
            end_ids=frozenset(),
            cache=self._loaded.new_cache(),
            sampler=Sampler(request.sampling),
            prefill_chunk=self._loaded.prefill_chunk,
            may_go_back=self.options.draft > 0,
            alpha=self._loaded.alpha_of(request),
        )
        generation.outbox.closed.set()
        return generation

    def assert_nothing_held(self) -> None:
        """No slot in use, no request open, no forecast left, on any role that lives."""
        self.settle(seconds=1.0)
        for peer_id, agent in self.agents.items():
            agent.state.check_integrity()
            report = agent.report()
            assert (report.used_slots, report.accounted_bytes) == (0, 0), peer_id
            assert agent.state.num_requests == 0, peer_id
            assert agent.state.num_wants == 0, peer_id
        assert not self.state.dispatch.calls
        assert not self.state.dispatch.requests
        assert not self.state.dispatch.forecasts
