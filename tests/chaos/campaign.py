"""A campaign: clients ask without a pause while one fault after the other befalls the cluster, at most so many at once
that two nodes are left which nothing has befallen.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Final

from chaos import roles
from chaos.clients import Client, Question
from chaos.cluster import Cluster
from chaos.faults import OF_FRAMES, Fault, draw
from chaos.ledger import Happened, Ledger

HEALTHY_NODES: Final = 2
_WARM_UP_S: Final = 1.0
_SAMPLE_S: Final = 0.5
_QUIET_S: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of a campaign. `most_hold_s` cuts what lasts longer; `budget_s` bounds the whole: faults that have
    not begun by then are left out. With `curve` all links are encrypted, and no fault changes their frames."""

    store: Path
    home: Path
    questions: Sequence[Question]
    faults: int = 200
    seed: int = 20_260_101
    nodes: int = 4
    clients: int = 3
    pace_s: float = 0.8
    most_hold_s: float = 10.0
    budget_s: float = 900.0
    curve: bool = False
    say: Callable[[str], None] = lambda text: None


@dataclass(kw_only=True)
class _Campaign:
    plan: Plan
    cluster: Cluster
    ledger: Ledger = field(default_factory=Ledger)
    over: bool = False
    _under_way: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)

    async def run(self) -> None:
        """From the first request to the last."""
        plan = self.plan
        askers = [
            Client(
                url=self.cluster.url,
                questions=list(plan.questions),
                ledger=self.ledger,
                number=number,
                stopping=lambda: self.over,
            )
            for number in range(plan.clients)
        ]
        asking = [asyncio.create_task(asker.run()) for asker in askers]
        watching = asyncio.create_task(self._watch_memory())
        try:
            await asyncio.sleep(_WARM_UP_S)
            await self._do_all()
            await self.cluster.whole()
        finally:
            self.over = True
            for task in (watching, *self._under_way.values()):  # one that failed must leave none to start a process
                task.cancel()
            await asyncio.gather(*asking)

    async def _do_all(self) -> None:
        without = OF_FRAMES if self.plan.curve else frozenset[str]()
        faults = draw(
            seed=self.plan.seed,
            count=self.plan.faults,
            nodes=self.cluster.nodes,
            pace_s=self.plan.pace_s,
            without=without,
        )
        until_s = monotonic() + self.plan.budget_s
        for drawn in faults:
            fault = replace(drawn, hold_s=min(drawn.hold_s, self.plan.most_hold_s))
            if monotonic() > until_s:
                self.plan.say(f"out of time after {fault.number} faults")
                break
            await asyncio.sleep(fault.wait_s)
            await self._make_room(fault)
            self._under_way[fault.target] = asyncio.create_task(self._one(fault))
            if fault.is_alone:
                await self._settle()
        await self._settle()

    async def _make_room(self, fault: Fault) -> None:
        """Wait until the fault may happen: its target is whole, and enough others are."""
        if fault.is_alone or fault.target in self._under_way:
            await self._settle()
        room = len(self.cluster.nodes) - HEALTHY_NODES
        while fault.role == "node" and sum(name in self.cluster.nodes for name in self._under_way) >= room:
            await asyncio.wait(self._under_way.values(), return_when=asyncio.FIRST_COMPLETED)
            self._sweep()

    async def _one(self, fault: Fault) -> None:
        began_s = monotonic()
        await self.cluster.befall(fault)
        self.ledger.happened.append(Happened(fault=fault, began_s=began_s, ended_s=monotonic()))
        self.plan.say(f"{fault.number:3} {fault.kind:<9} {fault.target:<9} {monotonic() - began_s:5.2f} s")
        await self.cluster.whole()

    async def _settle(self) -> None:
        """Until all is whole."""
        while self._under_way:
            await asyncio.wait(self._under_way.values())
            self._sweep()
        await asyncio.sleep(_QUIET_S)

    def _sweep(self) -> None:
        for target, task in list(self._under_way.items()):
            if task.done():
                del self._under_way[target]
                task.result()

    async def _watch_memory(self) -> None:
        server = self.cluster.processes.of["server"]
        while True:
            with suppress(FileNotFoundError, ProcessLookupError, IndexError):  # between two lives
                self.ledger.server_memory.append((monotonic(), server.lives, server.resident_bytes()))
            await asyncio.sleep(_SAMPLE_S)


def run(plan: Plan) -> Ledger:
    """The whole of it; nothing is left running."""

    async def whole() -> Ledger:
        cluster = Cluster(plan.store, plan.home, plan.nodes, plan.seed, curve=plan.curve)
        try:
            await cluster.start()
            campaign = _Campaign(plan=plan, cluster=cluster)
            await campaign.run()
            return campaign.ledger
        finally:
            await cluster.stop()

    roles.begin()
    return asyncio.run(whole())
