"""The decode loop alone, with a scripted model: answers that come in between the layers of a prompt."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from odmoe_server.cluster.calls import CallError
from odmoe_server.engine.rota import Patience
from odmoe_server.engine_api import (
    GenerationFailed,
    GenerationRequest,
)
from support.scripted_loop import (
    Running,
    collect,
    request,
    serve,
    until,
)


async def a_prompt_beside_an_answer(
    r: Running, *, at_layer: Callable[[int], None] = lambda layer: None
) -> tuple[AsyncGenerator[Any, None], AsyncGenerator[Any, None], list[int]]:
    """Answers (30 times 5) that run, a prompt (6, 7) that has joined, and how many steps had ended by each of the
    prompt's layers, at which `at_layer` is called."""
    steps: list[int] = []

    def layer_ended() -> None:
        if r.stepper.batches:  # else it is the answer's own prompt
            steps.append(len(r.stepper.batches))
            at_layer(len(steps))

    async def begun(prompt: GenerationRequest, has_come: Callable[[], bool]) -> AsyncGenerator[Any, None]:
        generator = r.loop.generate(prompt)
        joined = asyncio.ensure_future(anext(generator))
        await until(has_come)

        async def told() -> AsyncGenerator[Any, None]:
            try:
                yield await joined
                async for event in generator:
                    yield event
            finally:
                joined.cancel()
                await generator.aclose()

        return told()

    r.stepper.layer_ended = layer_ended
    r.stepper.gate.clear()
    first = await begun(request(*([5] * 30)), lambda: r.loop.health().running == 1)
    second = await begun(request(6, 7, max_tokens=2), lambda: r.loop.health().queued == 1)
    r.stepper.gate.set()
    return first, second, steps


@pytest.mark.parametrize("impatient", [True, False])
def test_answers_come_in_between_the_layers_of_a_prompt(monkeypatch: pytest.MonkeyPatch, impatient: bool) -> None:
    monkeypatch.setattr(Patience, "is_over", lambda self, part_s, num_layers: impatient)

    async def scenario(r: Running) -> None:
        r.stepper.layers = 3
        first, second, steps = await a_prompt_beside_an_answer(r)
        told = await asyncio.gather(collect(first), collect(second))
        assert [tokens for tokens, _ in told] == [[5] * 30, [6, 7]]
        assert [count - steps[0] for count in steps] == ([0, 1, 2] if impatient else [0, 0, 0])

    serve(scenario, max_running=2)


def test_a_prompt_whose_consumer_goes_away_between_layers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "is_over", lambda self, part_s, num_layers: True)

    async def scenario(r: Running) -> None:
        r.stepper.layers = 3
        at_gate = asyncio.Event()
        loop = asyncio.get_running_loop()

        def at_layer(layer: int) -> None:
            if layer == 1:
                r.stepper.gate.clear()
                loop.call_soon_threadsafe(at_gate.set)

        first, second, steps = await a_prompt_beside_an_answer(r, at_layer=at_layer)
        reading = asyncio.ensure_future(collect(second))
        await at_gate.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        r.stepper.gate.set()
        assert (await collect(first))[0] == [5] * 30
        assert (r.stepper.given_up, len(steps)) == ([[2]], 1)
        assert sorted(r.cluster.ended) == [1, 2]

    serve(scenario, max_running=2)


def test_a_prompt_that_fails_between_layers_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "is_over", lambda self, part_s, num_layers: True)

    async def scenario(r: Running) -> None:
        r.stepper.layers = 3

        def at_layer(layer: int) -> None:
            if layer == 2:
                raise CallError("no node")

        first, second, _ = await a_prompt_beside_an_answer(r, at_layer=at_layer)
        with pytest.raises(GenerationFailed):
            await collect(second)
        assert (await collect(first))[0] == [5] * 30

    serve(scenario, max_running=2)
