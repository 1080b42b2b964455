"""Which processes make up one `odmoe serve`: their commands, addresses, threads and settings. Starts none of them.

Threads are shared out explicitly, because N processes that each take every core slow one another down.
"""

import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from odmoe_server import models
from odmoe_server.children import ChildSpec
from odmoe_server.config import ServeSettings, ServingSettings

# Beyond the time that answers in hand may take: joining threads, closing sockets.
STOP_MARGIN_S = 10.0
# What the predictor takes at most.
MOST_AHEAD = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything is for one run."""

    settings: ServeSettings
    store: Path
    top_k: int
    runtime: Path
    listener: socket.socket
    cores: int

    @property
    def threads(self) -> int:
        """Threads of each process. Server and nodes take turns, the predictor runs beside them."""
        return self.settings.threads or max(1, self.cores // 2)

    @property
    def node_threads(self) -> int:
        """Threads of each node agent: all of them compute the same layer at once."""
        return self.settings.threads or max(1, self.cores // 2 // self.settings.nodes)

    def endpoint(self, name: str) -> str:
        """The address of one of our sockets."""
        return f"ipc://{self.runtime / name}.sock"


def children(plan: Plan) -> list[ChildSpec]:
    """All processes of the plan."""
    settings = plan.settings
    specs = [_server(plan), *(_node(plan, i) for i in range(settings.nodes))]
    return [*specs, _predictor(plan)] if settings.predictor else specs


def _server(plan: Plan) -> ChildSpec:
    settings = plan.settings
    common = {name: getattr(settings, name) for name in ServingSettings.model_fields if name != "config"}
    own = {
        "model": str(plan.store),
        "served_model_names": settings.served_model_names or (models.own_name(settings.model),),
        "endpoint": plan.endpoint("cluster"),
        "threads": plan.threads,
        "draft": drafts(settings),
        "listen_fd": plan.listener.fileno(),
        "exit_with_parent": True,
    }
    config = plan.runtime / "server.toml"
    config.write_text(toml({**common, **own}), encoding="utf-8")
    return ChildSpec(
        name="server",
        command=[sys.executable, "-m", "odmoe_server", "server", "--config", str(config)],
        environment=environment(plan.threads),
        pass_fds=(plan.listener.fileno(),),
        stops_first=True,
        stop_s=settings.drain_s + STOP_MARGIN_S,
    )


def _node(plan: Plan, index: int) -> ChildSpec:
    settings = plan.settings
    if settings.memory_mb is None:
        room = ["--slots", str(settings.slots or 2 * plan.top_k)]
    else:
        room = ["--memory-mb", str(settings.memory_mb)]
    name = f"node-{index}"
    command = [sys.executable, "-m", "odmoe_node", "--node-id", name, "--store", str(plan.store)]
    command += ["--server-endpoint", plan.endpoint("cluster"), "--threads", str(plan.node_threads), *room]
    if settings.predictor:
        command += ["--predictor-endpoint", plan.endpoint("predictor")]
    command += ["--device", settings.node_device]
    if settings.link_gbps is not None:
        command += ["--link-gbps", str(settings.link_gbps)]
    # All of them read the same files; one look at the digests is enough.
    command += [] if index == 0 else ["--no-verify"]
    return ChildSpec(name=name, command=[*command, *_common(plan)], environment=environment(plan.node_threads))


def _predictor(plan: Plan) -> ChildSpec:
    command = [sys.executable, "-m", "odmoe_predictor", "--store", str(plan.store)]
    command += ["--server-endpoint", plan.endpoint("cluster"), "--endpoint", plan.endpoint("predictor")]
    command += ["--peer-id", "predictor", "--threads", str(plan.threads), *_common(plan)]
    command += _forecasting(plan.settings)
    return ChildSpec(name="predictor", command=command, environment=environment(plan.threads))


def _forecasting(settings: ServeSettings) -> list[str]:
    """Only what the kind of predictor has a use for: it refuses the rest."""
    if settings.predictor_kind == "shadow":
        options = ["--precision", settings.shadow_precision, "--scope", settings.shadow_scope]
        options += ["--run-ahead", str(run_ahead(settings))]
        return [*options, "--feedback" if settings.feedback else "--no-feedback"]
    options = ["--kind", settings.predictor_kind]
    if settings.predictor_look_ahead is not None:
        options += ["--look-ahead", str(settings.predictor_look_ahead)]
    if settings.predictor_weights is not None:
        options += ["--weights", str(settings.predictor_weights)]
    return options


def drafts(settings: ServeSettings) -> int:
    """Guesses in a step: only the shadow has any."""
    return settings.draft if settings.predictor and settings.predictor_kind == "shadow" else 0


def run_ahead(settings: ServeSettings) -> int:
    """How far the shadow goes on by itself: while a step takes all its guesses, it makes those of the next."""
    if settings.run_ahead is not None:
        return settings.run_ahead
    return min(MOST_AHEAD, 2 * (1 + settings.draft)) if settings.draft else 1


def _common(plan: Plan) -> list[str]:
    settings = plan.settings
    return ["--log-level", settings.log_level, "--log-format", settings.log_format, "--exit-with-parent"]


def environment(threads: int) -> dict[str, str]:
    """Ours, without settings of the roles (they get theirs from the plan), and with the threads of OpenMP."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ODMOE_")}
    return {**inherited, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def toml(values: dict[str, Any]) -> str:
    """Flat settings as TOML: there, strings, numbers, booleans and lists of them are written as in JSON."""
    lines = []
    for name, value in values.items():
        if value is None:
            continue
        plain = value.get_secret_value() if isinstance(value, SecretStr) else value
        lines.append(f"{name} = {json.dumps(str(plain) if isinstance(plain, Path) else plain)}\n")
    return "".join(lines)
