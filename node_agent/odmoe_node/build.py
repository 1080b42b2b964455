"""Puts a node agent together out of its settings: store, bank, links. Starts nothing."""

import random
from contextlib import ExitStack
from importlib.metadata import version

import zmq

from odmoe_model.manifest import Manifest
from odmoe_model.store import ExpertStore
from odmoe_node.bank import SlotBank, open_bank, slots_within
from odmoe_node.bank_emulated import GIGABYTE
from odmoe_node.config import DEFAULT_SLOTS, MEGABYTE, NodeSettings
from odmoe_node.driver import PREDICTOR, SERVER, NodeAgent
from odmoe_node.load_time import try_load_us
from odmoe_wire.checks import Limits
from odmoe_wire.keys import CurveKeys
from odmoe_wire.link import DealerLink
from odmoe_wire.messages import Hello, ToNode
from odmoe_wire.pulse import PulsingLink


def limits_of(manifest: Manifest) -> Limits:
    """What a node of this model accepts."""
    return Limits(
        num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts, hidden_size=manifest.hidden_size
    )


def hello_of(manifest: Manifest, *, node_id: str, slots: int, budget_bytes: int, load_us: int = 0) -> Hello:
    """The introduction of a node that starts now: its incarnation is a new one."""
    return Hello(
        role="node",
        peer_id=node_id,
        incarnation=random.SystemRandom().getrandbits(62),
        package_version=version("odmoe"),
        store_digest=manifest.digest,
        slots=slots,
        budget_bytes=budget_bytes,
        load_us=load_us,
    )


def build_agent(settings: NodeSettings, *, node_id: str, context: "zmq.Context[zmq.Socket[bytes]]") -> NodeAgent:
    """An agent that has connected its links and holds its arena; `run` is its loop. Raises ValueError (StoreError,
    EndpointError, KeysError among them) with a message for the user."""
    store = ExpertStore.open(settings.store, verify=settings.verify)
    slots, budget_bytes = _budget(settings, record_bytes=store.manifest.record_bytes)
    bank: SlotBank = open_bank(
        store, num_slots=slots, device=settings.device, link_gbps=settings.link_gbps, budget_bytes=budget_bytes
    )
    keys = CurveKeys.load(settings.keys_dir, name=node_id) if settings.keys_dir else None

    def connect(endpoint: str, peer: str, io_thread: int) -> DealerLink:
        return DealerLink.connect(
            endpoint,
            identity=node_id,
            peer=peer,
            context=context,
            accept=ToNode,
            limits=limits_of(store.manifest),
            keys=keys,
            io_thread=io_thread,
        )

    with ExitStack() as on_error:
        server = connect(settings.server_endpoint, SERVER, 0)
        on_error.callback(server.close)
        predictor = connect(settings.predictor_endpoint, PREDICTOR, 1) if settings.predictor_endpoint else None
        on_error.pop_all()
    load_us = try_load_us(bank) if settings.link_gbps is None else _load_us(bank, link_gbps=settings.link_gbps)
    return NodeAgent(
        hello_of(store.manifest, node_id=node_id, slots=slots, budget_bytes=budget_bytes, load_us=load_us),
        bank=bank,
        server=server if settings.health_file is None else PulsingLink(server, file=settings.health_file),
        predictor=predictor,
        hello_every_s=settings.hello_every_s,
        torch_threads=settings.threads,
    )


def _load_us(bank: SlotBank, *, link_gbps: float) -> int:
    """Of an emulated link: known without trying, and the same however busy this machine is."""
    return max(1, round(bank.record_bytes / (link_gbps * GIGABYTE) * 1e6))


def _budget(settings: NodeSettings, *, record_bytes: int) -> tuple[int, int]:
    """(slots, bytes) the settings allow."""
    if settings.memory_mb is not None:
        budget_bytes = settings.memory_mb * MEGABYTE
        return slots_within(budget_bytes, record_bytes=record_bytes), budget_bytes
    slots = settings.slots or DEFAULT_SLOTS
    return slots, slots * record_bytes
