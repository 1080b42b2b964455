"""The decode loop alone, with a scripted model: order, bounds, ends, cancellation, failures. Real thread, no sleep."""

import asyncio
from typing import Any

import pytest
import torch

from odmoe_server.engine import loop
from odmoe_server.engine.kv import KvSize
from odmoe_server.engine.loop import Loaded
from odmoe_server.engine.sampling import Sampler
from odmoe_server.engine_api import (
    GenerationFailed,
    NotReady,
    QueueFull,
    Sampling,
    Token,
)
from support.scripted_loop import (
    END_ID,
    Running,
    collect,
    request,
    serve,
    until,
)


def test_tokens_come_in_order_and_the_end_token_is_counted_but_not_delivered() -> None:
    async def scenario(r: Running) -> None:
        tokens, finished = await collect(r.loop.generate(request(5, 6, 7)))
        assert tokens == [5, 6, 7]
        assert finished is not None
        assert (finished.reason, finished.prompt_tokens, finished.completion_tokens) == ("stop", 3, 4)
        health = r.loop.health()
        assert health.cluster is r.cluster.snapshot.figures
        assert (health.prompt_tokens_total, health.generation_tokens_total) == (3, 4)

    serve(scenario)


@pytest.mark.parametrize("end", [{}, {"ignore_eos": True, "stop_token_ids": frozenset({END_ID})}])
def test_no_end_token_before_min_tokens(end: dict[str, Any]) -> None:
    async def scenario(r: Running) -> None:
        tokens, finished = await collect(r.loop.generate(request(5, 6, min_tokens=4, **end)))
        assert (tokens, finished and finished.reason) == ([5, 6, 0, 0], "stop")

    serve(scenario)


def test_max_tokens_ends_with_length_and_ignore_eos_goes_on() -> None:
    async def scenario(r: Running) -> None:
        tokens, finished = await collect(r.loop.generate(request(5, 6, 7, max_tokens=2)))
        assert (tokens, finished and finished.reason) == ([5, 6], "length")
        tokens, finished = await collect(r.loop.generate(request(5, max_tokens=3, ignore_eos=True)))
        assert (tokens, finished and finished.reason) == ([5, END_ID, END_ID], "length")
        tokens, finished = await collect(r.loop.generate(request(5, 6, stop_token_ids=frozenset({6}))))
        assert (tokens, finished and finished.reason) == ([5], "stop")

    serve(scenario)


def test_requests_are_served_in_the_order_they_came_and_the_queue_is_bounded() -> None:
    async def scenario(r: Running) -> None:
        r.stepper.gate.clear()
        tasks = [asyncio.create_task(collect(r.loop.generate(request(5)))) for _ in range(1)]
        await until(lambda: r.loop.health().running == 1)
        for _ in range(2):
            tasks.append(asyncio.create_task(collect(r.loop.generate(request(5)))))
            await until(lambda: r.loop.health().queued == len(tasks) - 1)
        with pytest.raises(QueueFull) as full:
            await collect(r.loop.generate(request(5)))
        assert full.value.retry_after_s > 0
        r.stepper.gate.set()
        assert [tokens for tokens, _ in await asyncio.gather(*tasks)] == [[5]] * 3
        assert r.stepper.batches == [[1], [1], [2], [2], [3], [3]]

    serve(scenario, max_queued=2)


def test_a_consumer_that_goes_away_ends_its_sequence_within_a_step() -> None:
    async def scenario(r: Running) -> None:
        generator = r.loop.generate(request(*([5] * 30)))
        assert await anext(generator) == Token(5)
        r.stepper.gate.clear()
        await generator.aclose()
        steps = len(r.stepper.batches)
        r.stepper.gate.set()
        await until(lambda: r.cluster.ended == [1])
        assert len(r.stepper.batches) <= steps + 2  # one may have been under way, one at the gate
        assert r.loop.health().running == 0

    serve(scenario)


def test_a_long_prompt_goes_in_chunks_and_only_the_last_one_gives_a_token() -> None:
    async def scenario(r: Running) -> None:
        tokens, finished = await collect(r.loop.generate(request(5, 6, 7, 8, 9, max_tokens=3)))
        assert tokens == [5, 6, 7]
        assert r.stepper.took == [[5, 6], [7, 8], [9], [5], [6]]
        assert finished is not None
        assert (finished.prompt_tokens, finished.completion_tokens) == (5, 3)
        health = r.loop.health()
        assert (health.prompt_tokens_total, health.generation_tokens_total) == (5, 3)

    serve(scenario, prefill_chunk=2)


def test_a_consumer_that_goes_away_is_noticed_between_chunks() -> None:
    async def scenario(r: Running) -> None:
        r.stepper.gate.clear()
        generator = r.loop.generate(request(*([5] * 30)))
        waiting = asyncio.ensure_future(anext(generator))
        await until(lambda: r.loop.health().running == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        r.stepper.gate.set()
        await until(lambda: r.cluster.ended == [1])
        assert len(r.stepper.took) <= 1
        assert r.loop.health().generation_tokens_total == 0

    serve(scenario, prefill_chunk=2)


def test_a_cluster_failure_fails_the_request_and_the_next_one_is_served() -> None:
    async def scenario(r: Running) -> None:
        for broken in (13, 14):
            with pytest.raises(GenerationFailed):
                await collect(r.loop.generate(request(5, broken)))
            tokens, _ = await collect(r.loop.generate(request(5)))
            assert tokens == [5]
        # The loop's thread tells the consumer first and cleans up behind it.
        await until(lambda: r.cluster.ended == [1, 2, 3, 4])
        assert r.loop.health().failures_total == 1

    serve(scenario)


def test_those_that_run_together_take_steps_together_and_join_and_leave_between_steps() -> None:
    async def scenario(r: Running) -> None:
        r.stepper.gate.clear()
        first = asyncio.create_task(collect(r.loop.generate(request(5, 6, 7, 8))))
        await until(lambda: r.loop.health().running == 1)
        second = asyncio.create_task(collect(r.loop.generate(request(9, 10))))
        await until(lambda: r.loop.health().queued == 1)
        r.stepper.gate.set()
        assert [(await task)[0] for task in (first, second)] == [[5, 6, 7, 8], [9, 10]]
        # Prompts and answers take turns while there are both.
        assert r.stepper.batches == [[1], [1], [2], [1, 2], [1, 2], [1]]
        assert r.loop.health().kv_reserved_bytes == 0

    serve(scenario, max_running=4, prefill_chunk=8)


def test_who_asks_an_idle_server_at_the_same_time_begins_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting ends when no more have room, here long before its time."""
    monkeypatch.setattr(loop, "COMPANY_S", 10.0)
    monkeypatch.setattr(loop, "MOST_COMPANY_S", 10.0)

    async def scenario(r: Running) -> None:
        for first in (1, 4):
            await asyncio.gather(*(collect(r.loop.generate(request(5, max_tokens=1))) for _ in range(3)))
            assert r.stepper.batches[-1] == [first, first + 1, first + 2]
        assert len(r.stepper.batches) == 2

    serve(scenario, prefill_chunk=8, max_running=3)


def test_who_does_not_fit_waits_in_line_and_comes_in_time() -> None:
    async def scenario(r: Running) -> None:
        r.stepper.gate.clear()
        tasks = [asyncio.create_task(collect(r.loop.generate(request(5, max_tokens=30)))) for _ in range(2)]
        await until(lambda: (r.loop.health().running, r.loop.health().queued) == (1, 1))
        # This one would fit beside the first, but it came last.
        tasks.append(asyncio.create_task(collect(r.loop.generate(request(5, max_tokens=2)))))
        await until(lambda: r.loop.health().queued == 2)
        assert r.loop.health().kv_reserved_bytes == 31
        r.stepper.gate.set()
        assert [tokens for tokens, _ in await asyncio.gather(*tasks)] == [[5]] * 3
        assert r.stepper.batches[:2] == [[1], [1]]

    serve(scenario, max_running=4, kv_positions=40)


def test_the_context_is_no_longer_than_the_memory() -> None:
    async def scenario(r: Running) -> None:
        assert r.loop.context_length == 40

    serve(scenario, kv_positions=40)


def test_guesses_that_were_right_are_kept_and_the_first_wrong_one_ends_them() -> None:
    async def scenario(r: Running) -> None:
        r.stepper.guesses = [0, 6, 7, 3, 9]  # of the token at each place of the answer; the fourth is wrong
        tokens, finished = await collect(r.loop.generate(request(5, 6, 7, 8, 9)))
        assert tokens == [5, 6, 7, 8, 9]
        assert finished is not None
        assert finished.completion_tokens == 6
        # One more than were right is tried the next time.
        assert r.stepper.took == [[5, 6, 7, 8, 9], [5, 6, 7, 3], [8, 9]]

    serve(scenario, draft=3)


def test_no_more_is_guessed_than_may_be_delivered() -> None:
    async def scenario(r: Running) -> None:
        r.stepper.guesses = [0, 6, 7, 8, 9]
        tokens, finished = await collect(r.loop.generate(request(5, 6, 7, 8, 9, max_tokens=3)))
        assert (tokens, finished and finished.reason) == ([5, 6, 7], "length")
        assert r.stepper.took == [[5, 6, 7, 8, 9], [5, 6]]

    serve(scenario, draft=3)


def test_what_goes_wrong_with_one_result_is_not_the_others_failure() -> None:
    async def scenario(r: Running) -> None:
        r.stepper.gate.clear()
        bad = asyncio.create_task(collect(r.loop.generate(request(5, 15))))
        await until(lambda: r.loop.health().running == 1)
        good = asyncio.create_task(collect(r.loop.generate(request(5, 6, 7, 8))))
        await until(lambda: r.loop.health().queued == 1)
        r.stepper.gate.set()
        with pytest.raises(GenerationFailed):
            await bad
        assert (await good)[0] == [5, 6, 7, 8]
        assert r.loop.health().failures_total == 1

    serve(scenario, max_running=2, prefill_chunk=8)


def test_who_cannot_be_admitted_fails_alone_and_does_not_come_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(self: KvSize, positions: int) -> int:
        if positions == 2 + 13:
            raise RuntimeError("a bug")
        return positions

    async def scenario(r: Running) -> None:
        r.stepper.gate.clear()
        first = asyncio.create_task(collect(r.loop.generate(request(5, 6, 7))))
        await until(lambda: r.loop.health().running == 1)
        monkeypatch.setattr(KvSize, "bytes_for", sizes)
        bad = asyncio.create_task(collect(r.loop.generate(request(5, 6, max_tokens=13))))
        await until(lambda: r.loop.health().queued == 1)
        r.stepper.gate.set()
        with pytest.raises(GenerationFailed):
            await bad
        assert (await first)[0] == [5, 6, 7]
        assert (r.loop.health().failures_total, r.loop.health().queued) == (1, 0)

    serve(scenario, max_running=2, prefill_chunk=8)


def test_no_node_means_waiting_and_not_ready() -> None:
    async def scenario(r: Running) -> None:
        r.cluster.snapshot.num_nodes_alive = 0
        assert r.loop.health().state == "waiting"
        with pytest.raises(NotReady, match="node agent"):
            await collect(r.loop.generate(request(5)))

    serve(scenario)


def test_a_model_that_cannot_be_loaded_is_told_and_does_not_hang() -> None:
    def broken() -> Loaded:
        raise OSError("no such file")

    async def scenario(r: Running) -> None:
        assert r.loop.health().state == "dead"
        with pytest.raises(NotReady, match="could not be loaded"):
            await collect(r.loop.generate(request(5)))

    serve(scenario, load=broken)


def test_stopping_leaves_nobody_waiting() -> None:
    async def scenario(r: Running) -> None:
        r.stepper.gate.clear()
        tasks = [asyncio.create_task(collect(r.loop.generate(request(5, 6)))) for _ in range(3)]
        await until(lambda: r.loop.health().queued == 2)
        stop = asyncio.create_task(asyncio.to_thread(r.loop.stop))
        await until(lambda: r.loop.health().state == "stopping")
        r.stepper.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, NotReady) for result in results)
        await stop

    serve(scenario)


class TestSampler:
    logits_V = torch.tensor([0.0, 3.0, 1.0, 2.9])

    def test_greedy_takes_the_highest_and_the_first_of_equals(self) -> None:
        assert Sampler(Sampling(temperature=0.0)).next_token(self.logits_V, [0]).token_id == 1
        assert Sampler(Sampling(temperature=0.0)).next_token(torch.tensor([1.0, 2.0, 2.0]), [0]).token_id == 1

    def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(self) -> None:
        def draw(seed: int) -> list[int]:
            sampler = Sampler(Sampling(temperature=1.5, seed=seed))
            return [sampler.next_token(self.logits_V, [0]).token_id for _ in range(40)]

        assert draw(1) == draw(1)
        assert draw(1) != draw(2)

    def test_top_p_and_temperature_narrow_the_choice(self) -> None:
        for sampling in (Sampling(top_p=0.4, seed=0), Sampling(temperature=0.01, seed=0)):
            sampler = Sampler(sampling)
            assert {sampler.next_token(self.logits_V, [0]).token_id for _ in range(50)} == {1}
        sampler = Sampler(Sampling(top_p=0.9, seed=0))
        assert {sampler.next_token(self.logits_V, [0]).token_id for _ in range(200)} == {1, 3}
