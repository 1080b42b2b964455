"""A decode loop whose model is a script. Real thread, no sleep."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from odmoe_server.cluster.calls import CallError
from odmoe_server.engine.kv import KvSize
from odmoe_server.engine.loop import DecodeLoop, EngineLimits, Loaded
from odmoe_server.engine_api import (
    ClusterFigures,
    Finished,
    GenerationRequest,
    Sampling,
    Token,
)
from odmoe_server.moe.tally import Tally

END_ID = 2
VOCABULARY = 16
WAIT_S = 10.0


@dataclass
class ScriptedStepper:
    """Gives each sequence the tokens its prompt asks for: prompt (5, 6, 7) is answered 5, 6, 7. A step may be held
    at the gate; token 13 makes the cluster fail, 14 the model itself, 15 what is done with one sequence's result.
    `guesses` are drafted, from the script's place where the sequence is. A step with prompts stops behind so many
    `layers`; `layer_ended` is called at each."""

    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[list[int]] = field(default_factory=list)
    took: list[list[int]] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    layers: int = 1
    layer_ended: Callable[[], None] = lambda: None
    given_up: list[list[int]] = field(default_factory=list)

    def draft(self, sequence: Any, *, most: int) -> None:
        sequence.draft_ids = self.guesses[sequence.completion_tokens :][: min(most, sequence.draft_room)]

    def step(self, batch: Any) -> list[list[torch.Tensor]]:
        assert self.gate.wait(WAIT_S)
        self.batches.append([sequence.sequence_id for sequence in batch])
        self.took += [sequence.fresh_ids + sequence.draft_ids for sequence in batch]
        return [self._rows(sequence) for sequence in batch]

    def step_by_layer(self, batch: Any) -> Generator[None, None, list[list[torch.Tensor]]]:
        try:
            for _ in range(self.layers):
                self.layer_ended()
                yield
        except GeneratorExit:
            self.given_up.append([sequence.sequence_id for sequence in batch])
            raise
        return self.step(batch)

    def _rows(self, sequence: Any) -> list[torch.Tensor]:
        script = [*sequence.request.prompt_ids, END_ID]
        rows = []
        for place in range(sequence.completion_tokens, sequence.completion_tokens + 1 + len(sequence.draft_ids)):
            token = script[min(place, len(script) - 1)]
            if token == 13:
                raise CallError("no node")
            if token == 14:
                raise RuntimeError("a bug")
            rows.append(torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY).float())
        return rows

    def take(self, sequence: Any, rows: Any) -> None:
        if not sequence.is_prompt and int(rows[0].argmax()) == 15:
            raise RuntimeError("a bug in a processor")
        sequence.take(rows)


@dataclass
class FakeSnapshot:
    num_nodes_alive: int = 1
    predictor_incarnation: int | None = None
    peers: tuple[Any, ...] = ()
    failovers_total: int = 0
    predicted_late_total: int = 0
    protocol_errors_total: int = 0
    figures: ClusterFigures = field(default_factory=ClusterFigures)


class FakeCache:
    """Counts positions; cut back as a real one is, through `kvcache`, which sees no layers in it."""

    layers: tuple[Any, ...] = ()

    def get_seq_length(self) -> int:
        return 1 << 20


@dataclass
class FakeCluster:
    snapshot: FakeSnapshot = field(default_factory=FakeSnapshot)
    ended: list[int] = field(default_factory=list)
    timeline: Any = None

    def end_sequence(self, sequence: int) -> None:
        self.ended.append(sequence)


@dataclass
class Running:
    loop: DecodeLoop
    stepper: ScriptedStepper
    cluster: FakeCluster
    loaded: threading.Event


@contextmanager
def running(
    *,
    max_queued: int = 4,
    max_running: int = 1,
    load: Callable[[], Loaded] | None = None,
    prefill_chunk: int | None = None,
    kv_positions: int = 1000,
    draft: int = 0,
) -> Iterator[Running]:
    stepper, cluster, loaded = ScriptedStepper(), FakeCluster(), threading.Event()
    stepper.gate.set()

    def load_scripted() -> Loaded:
        assert loaded.wait(WAIT_S)
        return Loaded(
            stepper=stepper,  # type: ignore[arg-type]
            new_cache=FakeCache,  # type: ignore[arg-type]
            total=Tally(),
            prefill_chunk=prefill_chunk,
            kv_size=KvSize(layers=((1, None),)),
            kv_budget_bytes=kv_positions,
            prefix_cache=False,
            draft=draft,
        )

    end_ids = frozenset({END_ID})
    limits = EngineLimits(context_length=64, end_ids=end_ids, max_queued=max_queued, max_running=max_running)
    loop = DecodeLoop(cluster=cluster, limits=limits, load=load or load_scripted)  # type: ignore[arg-type]
    loop.start()
    loaded.set()
    try:
        yield Running(loop, stepper, cluster, loaded)
    finally:
        stepper.gate.set()
        loop.stop()


def request(*prompt_ids: int, max_tokens: int = 32, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        sampling=Sampling(**{"temperature": 0.0, **sampling}),
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


async def collect(generator: AsyncGenerator[Token | Finished, None]) -> tuple[list[int], Finished | None]:
    tokens: list[int] = []
    async for event in generator:
        if isinstance(event, Finished):
            return tokens, event
        tokens.append(event.token_id)
    return tokens, None


def serve(scenario: Callable[[Running], Any], **options: Any) -> None:
    with running(**options) as r:

        async def run() -> None:
            await until(lambda: r.loop.health().state != "loading")
            await scenario(r)

        asyncio.run(run())
