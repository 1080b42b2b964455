"""A whole cluster in one process: real engine, real node agents, real predictor, real sockets, a thread for each role.

For tests that ask whether the text is right. Knows every role, as only tests and the launcher may.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import zmq

from odmoe_model.store import ExpertStore
from odmoe_node.bank import open_bank
from odmoe_node.driver import NodeAgent
from odmoe_predictor.driver import Predictor
from odmoe_predictor.shadow import Shadow
from odmoe_predictor.switchboard import FromNode, FromServer
from odmoe_server.engine.build import EngineOptions, ServingEngine, build_engine
from odmoe_server.engine_api import Finished, GenerationRequest, Sampling
from odmoe_wire.checks import Limits
from odmoe_wire.link import DealerLink, Link, RouterLink
from odmoe_wire.messages import Hello, ToNode

WAIT_S = 240.0
Wrap = Callable[[Link], Link]


def limits_of(store: ExpertStore) -> Limits:
    return Limits(num_layers=store.manifest.num_moe_layers, num_experts=store.manifest.num_experts)


def node_hello(store: ExpertStore, *, peer_id: str, slots: int, load_us: int = 0) -> Hello:
    return Hello(
        role="node",
        peer_id=peer_id,
        incarnation=random.getrandbits(62),
        package_version=version("odmoe"),
        store_digest=store.manifest.digest,
        slots=slots,
        budget_bytes=slots * store.manifest.record_bytes,
        load_us=load_us,
    )


def predictor_hello(store: ExpertStore) -> Hello:
    return Hello(
        role="predictor",
        peer_id="predictor",
        incarnation=0,
        package_version=version("odmoe"),
        store_digest=store.manifest.digest,
    )


@dataclass
class Role:
    """A predictor and the thread it runs on."""

    predictor: Predictor
    thread: threading.Thread

    def stop(self) -> None:
        self.predictor.stop()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


@dataclass
class Node:
    """A node agent and the thread it runs on."""

    agent: NodeAgent
    thread: threading.Thread

    def stop(self) -> None:
        self.agent.stop()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


@dataclass
class LocalCluster:
    """`server_endpoint` and `predictor_endpoint` are ipc addresses in a directory of the test's own."""

    store: ExpertStore
    engine: ServingEngine
    directory: Path
    context: "zmq.Context[zmq.Socket[bytes]]"
    nodes: dict[str, Node] = field(default_factory=dict)
    shadow: Role | None = None

    @property
    def server_endpoint(self) -> str:
        return f"ipc://{self.directory}/server"

    @property
    def predictor_endpoint(self) -> str:
        return f"ipc://{self.directory}/predictor"

    def add_node(
        self, peer_id: str, *, slots: int, wrap: Wrap = lambda link: link, link_gbps: float | None = None
    ) -> Node:
        """Start a node agent; `wrap` may put a fault in front of its link to the server. With `link_gbps` its device is
        emulated."""

        def connect(endpoint: str, peer: str) -> Link:
            return DealerLink.connect(
                endpoint,
                identity=peer_id,
                peer=peer,
                context=self.context,
                accept=ToNode,
                limits=limits_of(self.store),
            )

        agent = NodeAgent(
            node_hello(self.store, peer_id=peer_id, slots=slots),
            bank=open_bank(
                self.store, num_slots=slots, device="cpu" if link_gbps is None else "emulated", link_gbps=link_gbps
            ),
            server=wrap(connect(self.server_endpoint, "server")),
            predictor=connect(self.predictor_endpoint, "predictor"),
        )
        thread = threading.Thread(target=agent.run, name=peer_id, daemon=True)
        thread.start()
        self.nodes[peer_id] = Node(agent, thread)
        return self.nodes[peer_id]

    def add_predictor(self) -> Role:
        """Start a predictor with an int8 shadow."""
        link_options = {"context": self.context, "limits": limits_of(self.store)}
        predictor = Predictor(
            predictor_hello(self.store),
            Shadow.load(self.store),
            server=DealerLink.connect(
                self.server_endpoint, identity="predictor", peer="server", accept=FromServer, **link_options
            ),
            nodes=RouterLink.bind(self.predictor_endpoint, accept=FromNode, **link_options),
            num_layers=self.store.manifest.num_moe_layers,
        )
        thread = threading.Thread(target=predictor.run, name="predictor", daemon=True)
        thread.start()
        self.shadow = Role(predictor, thread)
        return self.shadow

    def await_health(self, condition: Callable[[ServingEngine], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition(self.engine):
            assert time.monotonic() < deadline_s, self.engine.health()
            time.sleep(0.01)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int = 64,
        ignore_eos: bool = True,
        on_token: Callable[[int], None] = lambda count: None,
    ) -> tuple[list[int], Finished]:
        """Greedy tokens of one request; `on_token` hears how many there are after each."""

        async def run() -> tuple[list[int], Finished]:
            request = GenerationRequest(
                request_id="test",
                prompt_ids=tuple(prompt_ids),
                max_tokens=max_tokens,
                sampling=Sampling(temperature=0.0, ignore_eos=ignore_eos),
            )
            tokens: list[int] = []
            async with asyncio.timeout(WAIT_S):
                async for event in self.engine.generate(request):
                    if isinstance(event, Finished):
                        return tokens, event
                    tokens.append(event.token_id)
                    on_token(len(tokens))
            raise AssertionError("the engine ended without saying so")

        return asyncio.run(run())


@contextmanager
def local_cluster(
    store: ExpertStore,
    directory: Path,
    *,
    nodes: int = 2,
    slots: int = 1,
    predictor: bool = True,
    options: EngineOptions | None = None,
    link_gbps: float | None = None,
) -> Iterator[LocalCluster]:
    """A cluster that is ready to serve; everything has ended when the block is left."""
    context = zmq.Context[zmq.Socket[bytes]]()
    options = options or EngineOptions(endpoint=f"ipc://{directory}/server")
    engine = build_engine(store, options, context=context)
    cluster = LocalCluster(store, engine, directory, context)
    with ExitStack() as exits:
        exits.callback(context.destroy, linger=0)
        exits.callback(engine.stop)
        engine.start()
        exits.callback(lambda: [node.stop() for node in cluster.nodes.values()])
        exits.callback(lambda: cluster.shadow and cluster.shadow.stop())
        if predictor:
            cluster.add_predictor()
        for number in range(nodes):
            cluster.add_node(f"node{number}", slots=slots, link_gbps=link_gbps)
        cluster.await_health(lambda e: e.health().state == "ready" and _num_alive(e) == nodes)
        cluster.await_health(lambda e: e.health().predictor_alive == predictor)
        yield cluster


def _num_alive(engine: ServingEngine) -> int:
    return sum(peer.alive and peer.role == "node" for peer in engine.health().nodes)
