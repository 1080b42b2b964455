"""A predictor process from good settings: store, shadow or rival, and links put together. Knows no signals.

The work is in `driver`.
"""

import logging
from importlib.metadata import version
from time import monotonic
from typing import Final

import torch
import zmq
from rich.console import Console

from odmoe_model.quantize import HalfWeight, Int4Weight, Int8Weight, Nf4Weight, Quantizer
from odmoe_model.store import ExpertStore, StoreError
from odmoe_predictor.config import Precision, PredictorSettings
from odmoe_predictor.driver import Predictor
from odmoe_predictor.report import report_line, report_table
from odmoe_predictor.rivals.base import Rival
from odmoe_predictor.rivals.build import make_rival
from odmoe_predictor.shadow import Shadow
from odmoe_predictor.switchboard import SERVER, FromNode, FromServer, RefusedError
from odmoe_wire import endpoints
from odmoe_wire.checks import Limits
from odmoe_wire.endpoints import EndpointError
from odmoe_wire.keys import CurveKeys, KeysError
from odmoe_wire.lifeline import settle_heap
from odmoe_wire.link import DealerLink, Link, RouterLink
from odmoe_wire.messages import Hello
from odmoe_wire.pulse import PulsingLink
from odmoe_wire.settings import table

log = logging.getLogger(__name__)

QUANTIZERS: Final[dict[Precision, Quantizer]] = {
    "fp16": HalfWeight,
    "int8": Int8Weight,
    "nf4": Nf4Weight,
    "int4": Int4Weight,
}
_PROGRESS_EVERY_S: Final = 5.0


class CannotRunError(Exception):
    """The predictor cannot do its work; the message says why and what to do."""


def run(settings: PredictorSettings, *, title: str) -> None:
    """Load what forecasts and serve until an exception such as KeyboardInterrupt comes. Raises CannotRunError."""
    console = Console(stderr=True)
    console.print(table(settings, title=title))
    torch.set_num_threads(settings.threads)
    try:
        _run(settings, console)
    except (StoreError, EndpointError, KeysError) as error:
        raise CannotRunError(str(error)) from error
    except RefusedError as error:
        raise CannotRunError(f"the server refused this predictor: {error}") from error


def _run(settings: PredictorSettings, console: Console) -> None:
    store = ExpertStore.open(settings.store, verify=settings.verify)
    hello = Hello(
        role="predictor",
        peer_id=settings.peer_id,
        incarnation=0,  # drawn by the switchboard
        package_version=version("odmoe"),
        store_digest=store.manifest.digest,
    )
    num_layers = store.manifest.num_moe_layers
    limits = Limits(
        num_layers=num_layers,
        num_experts=store.manifest.num_experts,
        hidden_size=store.manifest.hidden_size,
    )
    with endpoints.context(num_links=2) as context:
        server, nodes = _links(settings, limits, context)
        try:
            forecaster = _load(settings, store)
            del store  # and with it the mapping of all experts
            if isinstance(forecaster, Shadow):
                console.print(report_table(forecaster.report))
            predictor = Predictor(
                hello,
                forecaster,
                server=server,
                nodes=nodes,
                num_layers=num_layers,
                run_ahead=settings.run_ahead,
                max_sequences=settings.max_sequences,
            )
            settle_heap()
            log.info("node agents can connect to %s", nodes.endpoint)
            predictor.run()
        finally:
            for link in (server, nodes):
                link.close()


def _links(
    settings: PredictorSettings, limits: Limits, context: "zmq.Context[zmq.Socket[bytes]]"
) -> tuple[Link, RouterLink]:
    """Before the weights, so that a taken port is known at once."""
    keys = None if settings.keys_dir is None else CurveKeys.load(settings.keys_dir, name=settings.peer_id)
    nodes = RouterLink.bind(settings.endpoint, context=context, accept=FromNode, limits=limits, keys=keys)
    try:
        server = DealerLink.connect(
            settings.server_endpoint,
            identity=settings.peer_id,
            peer=SERVER,
            context=context,
            accept=FromServer,
            limits=limits,
            keys=keys,
            io_thread=1,
        )
    except (EndpointError, KeysError):
        nodes.close()
        raise
    return server if settings.health_file is None else PulsingLink(server, file=settings.health_file), nodes


def _load(settings: PredictorSettings, store: ExpertStore) -> Shadow | Rival:
    if settings.kind == "shadow":
        return _load_shadow(settings, store)
    try:
        rival = make_rival(settings.kind, store, look_ahead=settings.look_ahead or 1, weights=settings.weights)
    except ValueError as error:
        raise CannotRunError(str(error)) from error
    log.info("the %s predictor holds %.1f MB", settings.kind, rival.held_bytes / 1e6)
    return rival


def _load_shadow(settings: PredictorSettings, store: ExpertStore) -> Shadow:
    began_s = said_s = monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal said_s
        if monotonic() >= said_s + _PROGRESS_EVERY_S:
            said_s = monotonic()
            log.info("quantised %d of %d layers", done, total)

    shadow = Shadow.load(
        store,
        quantize=QUANTIZERS[settings.precision],
        scope=settings.scope,
        device=settings.device,
        max_sequences=settings.max_sequences,
        feedback=settings.feedback,
        on_progress=on_progress,
    )
    log.info("loaded in %.1f s: %s", monotonic() - began_s, report_line(shadow.report))
    return shadow
