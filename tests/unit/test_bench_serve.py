"""The benchmark of many users: figures from given times, its question, its record, the engines it compares with."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from odmoe_server.bench import serve_record
from odmoe_server.bench.record import Machine
from odmoe_server.bench.serve_engines import InstantEngine, ResidentEngine
from odmoe_server.bench.serve_load import Told, percentiles, summary
from odmoe_server.bench.serve_question import BATCHED, ODMOE, Question, question
from odmoe_server.engine_api import Finished, GenerationRequest, Sampling, Token
from support.tiny import tiny_model

DEADLINE_S = 30.0


def told(began_s: float, *came_s: float) -> Told:
    return Told(began_s=began_s, came_s=came_s, tokens=len(came_s), prompt_tokens=7)


def test_the_figures_of_two_streams() -> None:
    found = summary([told(0.0, 1.0, 2.0, 4.0), told(0.0, 3.0, 5.0)])
    assert found["output_tokens"] == 5
    assert found["output_tokens_per_s"] == 1.0
    assert found["output_tokens_per_s_per_user"] == pytest.approx((3 / 4 + 2 / 5) / 2)
    assert found["ttft_ms_p50"] == 2000
    assert found["itl_ms_p50"] == 2000  # of 1, 2 and 2 seconds
    assert found["itl_ms_p99"] == 2000


def test_percentiles_of_nothing_are_nothing() -> None:
    assert percentiles("x", []) == {"x_p50": None, "x_p90": None, "x_p99": None}


def asked(**options: Any) -> Question:
    given: dict[str, Any] = {"quick": True, "url": None, "streams": None, "tokens": None, "repeats": 1, "names": None}
    return question(store=Path("store"), settings={"nodes": 3}, **(given | options))


def test_what_is_asked() -> None:
    assert asked().streams == (1, 2, 4)
    assert asked(quick=False).streams == (1, 2, 4, 8, 16)
    assert asked(names=["batched", "odmoe"]).variants == [BATCHED, ODMOE]
    assert asked(tokens=5).tokens == 5
    assert asked().facts()["settings"]["nodes"] == 3
    with pytest.raises(ValueError, match="sideways"):
        asked(names=["sideways"])


MACHINE = Machine(cpu="Some CPU", cores=2, memory_gb=8, system="Linux")


def test_the_record_says_what_the_rows_do(tmp_path: Path) -> None:
    def row(variant: str, streams: int, speed: float | None, **more: Any) -> dict[str, Any]:
        each = speed and speed / streams
        figures = {"output_tokens_per_s": speed, "output_tokens_per_s_per_user": each, "itl_ms_p50": 100.0}
        return {"variant": variant, "streams": streams, **figures, **more}

    disturbed = {"itl_ms_p99": 250.0, "undisturbed_itl_ms_p50": 100.0, "prompt_tokens": 1000}
    rows = [row(ODMOE, 1, 2.0), row(ODMOE, 8, 7.0), row("odmoe, long prompt", 8, None, **disturbed)]
    # Two chunks of 400 us for three tokens, ten of which take the server a second.
    cost = {"chunks_per_core_s": 2500.0, "cpu_us_per_chunk": 400.0, "chunks": 200, "output_tokens": 300}
    rows += [row(ODMOE, 16, 10.0), {"variant": "front", "streams": 16, "output_tokens_per_s": 9.0, **cost}]
    kept = serve_record.record_of(rows, facts={}, machine=MACHINE, command="odmoe bench serve")
    assert any("3.50 times" in note for note in kept.notes)
    assert any("2.50 times" in note for note in kept.notes)
    assert any("2500 streamed chunks/s" in note for note in kept.notes)
    assert any("front, 16 streams: 0.27% of a step" in note for note in kept.notes)
    assert len(kept.notes) == 4
    assert "| front" in kept.markdown(picture=None)
    pytest.importorskip("matplotlib")
    serve_record.draw(rows, tmp_path / "picture.png", title="title")
    assert (tmp_path / "picture.png").stat().st_size > 1000


async def answer(engine: ResidentEngine | InstantEngine, ids: list[int], tokens: int) -> list[int]:
    request = GenerationRequest(
        request_id="r", prompt_ids=tuple(ids), max_tokens=tokens, sampling=Sampling(temperature=0)
    )
    found = []
    async for event in engine.generate(request):
        if isinstance(event, Finished):
            assert event.completion_tokens == tokens
        else:
            assert isinstance(event, Token)
            found.append(event.token_id)
    return found


def greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """What the model says alone, without a cache."""
    found = list(ids)
    with torch.inference_mode():
        for _ in range(tokens):
            found.append(int(model(input_ids=torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


PROMPTS = [([5, 9, 3], 6), ([7], 4), ([1, 2, 3, 4, 5, 6, 7, 8], 5)]


@pytest.mark.parametrize("max_batch", [1, 8])
def test_transformers_behind_the_api_says_what_transformers_says(max_batch: int) -> None:
    model = tiny_model("mixtral")

    async def scenario() -> list[list[int]]:
        engine = ResidentEngine(model, context_length=64, max_batch=max_batch)
        waiting = [asyncio.ensure_future(answer(engine, ids, tokens)) for ids, tokens in PROMPTS]
        await asyncio.sleep(0)  # all of them wait before the first batch is made
        engine.start()
        try:
            return await asyncio.wait_for(asyncio.gather(*waiting), DEADLINE_S)
        finally:
            engine.stop()

    assert asyncio.run(scenario()) == [greedy(model, ids, tokens) for ids, tokens in PROMPTS]


@pytest.mark.parametrize("paced", [True, False])
def test_instant_tokens(paced: bool) -> None:
    engine = InstantEngine([4, 5], context_length=64, paced=paced)
    assert asyncio.run(answer(engine, [1], 5)) == [4, 5, 4, 5, 4]
