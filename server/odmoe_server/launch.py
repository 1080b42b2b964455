"""`odmoe serve`: every role of one model as a child of this process, from the first word to the last.

Keeps thin: it loads no torch, so that what it costs does not count.
"""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from odmoe_model.manifest import read_manifest
from odmoe_server import listening, models
from odmoe_server.children import Supervisor, spawn_with
from odmoe_server.config import ServeSettings
from odmoe_server.launch_plan import Plan, children
from odmoe_wire import logs

log = logging.getLogger(__name__)

TICK_S = 0.1
PROBE_TIMEOUT_S = 2.0
PREPARE_STOP_S = 10.0
# A predictor of a large model takes minutes to load; serving begins without it.
PATIENCE_S = 120.0
GRAVE = (" ERROR ", " CRITICAL ")
IMPORTANT = (" WARNING ", *GRAVE)
NUM_LAST_WORDS = 30


def ensure_store(model: str, *, wheel: Path | None = None) -> Path:
    """The prepared store of `model`, made by a process of its own if it has to be. Raises ValueError or SystemExit
    with that process's status; it has told why."""
    if (store := models.find_store(model)) is not None:
        return store
    command = [sys.executable, "-m", "odmoe_server", "prepare", model, "--exit-with-parent"]
    if wheel is not None:
        command += ["--wheel", str(wheel)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            try:
                process.wait(PREPARE_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if process.returncode != 0:
        raise SystemExit(process.returncode if process.returncode > 0 else 1)
    return Path(output.strip())


@contextmanager
def runtime_directory() -> Iterator[Path]:
    """A directory only this user may enter, for the sockets and settings of one run."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    usable = base if base and os.access(base, os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="odmoe-", dir=usable))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass
class Signals:
    """How often this process was asked to end."""

    count: int = 0
    last: int = 0

    def install(self) -> None:
        """Count SIGINT, SIGTERM and SIGHUP from now on."""
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sign, self._came)

    def _came(self, sign: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last = sign


@dataclass(kw_only=True)
class Voices:
    """What the children write, each line under its child's name: all the server says, and of the others what
    matters, unless `all_of_it` is wanted. When one dies, what it said last is shown too. JSON says itself who speaks:
    there, lines come without names."""

    console: Console
    all_of_it: bool
    with_names: bool = True
    # Once all of it ends on request, what the others say of that is no news.
    ending: bool = False
    _kept: dict[str, deque[str]] = field(default_factory=dict)

    def forward(self, name: str, line: str) -> None:
        """Called from the child's own thread."""
        important = GRAVE if self.ending else IMPORTANT
        if name == "server" or self.all_of_it or any(word in line for word in important):
            self._print(name, line)
        else:
            self._kept.setdefault(name, deque(maxlen=NUM_LAST_WORDS)).append(line)

    def last_words(self, name: str) -> None:
        """Show what was kept back."""
        for line in self._kept.pop(name, ()):
            self._print(name, line)

    def _print(self, name: str, line: str) -> None:
        before = Text(f"{name:<9} | ", style="dim") if self.with_names else Text()
        self.console.print(before + Text(line), soft_wrap=True)


@dataclass(kw_only=True)
class Launcher:
    """One run, from the first child to the last."""

    plan: Plan
    console: Console
    signals: Signals = field(default_factory=Signals)
    _told: str = ""
    _greeted: bool = False

    def run(self) -> int:
        """Serve until asked to end; the exit status."""
        self.signals.install()
        settings = self.plan.settings
        as_json = settings.log_format == "json"
        voices = Voices(
            console=self.console, all_of_it=as_json or settings.log_level == "debug", with_names=not as_json
        )
        specs = children(self.plan)
        supervisor = Supervisor(specs=specs, spawn=spawn_with(voices.forward), on_death=voices.last_words)
        try:
            return self._watch(supervisor, peers=[spec.name for spec in specs if spec.name != "server"])
        finally:
            asked = self.signals.count
            voices.ending = asked > 0
            supervisor.stop(hurry=lambda: self.signals.count > asked)

    def _watch(self, supervisor: Supervisor, *, peers: Sequence[str]) -> int:
        url = listening.url(self.plan.listener)
        patience_until_s = time.monotonic() + PATIENCE_S
        with httpx.Client(base_url=url, timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
            while not self.signals.count:
                supervisor.tick(time.monotonic())
                if self._lost(supervisor.given_up()):
                    self.console.print("odmoe: cannot go on; the lines above say why", style="red")
                    return 1
                if not self._greeted:
                    self._tell(probe(client), peers=peers, patient=time.monotonic() < patience_until_s)
                time.sleep(TICK_S)
        self.console.print("odmoe: ending (Ctrl-C again to end at once)")
        return 0

    def _lost(self, given_up: Sequence[str]) -> bool:
        """Without a server, or without any node, there is nothing left to serve with."""
        nodes = [name for name in given_up if name.startswith("node-")]
        return "server" in given_up or len(nodes) == self.plan.settings.nodes

    def _tell(self, health: dict[str, Any] | None, *, peers: Sequence[str], patient: bool) -> None:
        """Print how things stand if that is news."""
        if health is None:
            return
        news = obstacle(health, expected=peers, patient=patient)
        if news is None:
            self._greeted = True
            self.console.print(greeting(self.plan), markup=False, highlight=False, soft_wrap=True)
        elif news != self._told:
            self._told = news
            self.console.print(f"odmoe: {news}", markup=False, highlight=False)


def probe(client: httpx.Client) -> dict[str, Any] | None:
    """What the server says of itself; None while it does not answer."""
    try:
        body = client.get("/health").json()
    except (httpx.HTTPError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def obstacle(health: dict[str, Any], *, expected: Sequence[str], patient: bool) -> str | None:
    """What keeps a user from beginning, in words; None when nothing does. It can be begun without some of the
    peers, but who is `patient` waits for all."""
    if health["state"] != "ready":
        return str(health["detail"])
    there = {node["id"] for node in health["nodes"] if node["alive"]}
    missing = [name for name in expected if name not in there]
    return f"waiting for {', '.join(missing)}" if missing and patient else None


def greeting(plan: Plan) -> str:
    """What a person needs to know to begin."""
    settings = plan.settings
    url = listening.url(plan.listener)
    name = (*settings.served_model_names, models.own_name(settings.model))[0]
    question = {"model": name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body = shlex.quote(json.dumps(question))
    keyed = settings.api_key is not None or settings.api_key_file is not None
    key = ' -H "Authorization: Bearer $ODMOE_API_KEY"' if keyed else ""
    return (
        f"\nodmoe serves {name!r} at {url}/v1 with {settings.nodes} node agents. Try:\n\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {body}\n\n"
        f"or talk to it: odmoe chat --url {url}\nCtrl-C ends everything.\n"
    )


def serve(settings: ServeSettings, *, console: Console) -> int:
    """Everything from the model's name to the end; the exit status. Raises ValueError with a message for the user."""
    logs.configure(settings.log_level, settings.log_format, role="serve")
    listener = listening.bind(settings.host, settings.port)
    store = ensure_store(settings.model, wheel=settings.wheel)
    with listener, runtime_directory() as runtime:
        plan = Plan(
            settings=settings,
            store=store,
            top_k=read_manifest(store).top_k,
            runtime=runtime,
            listener=listener,
            cores=len(os.sched_getaffinity(0)),
        )
        return Launcher(plan=plan, console=console).run()
