"""What comes with the model: generation defaults and tokenizer, in the store and without one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from odmoe_model.prepare import prepare
from odmoe_model.skeleton import load_generation_config, load_skeleton, load_tokenizer
from odmoe_model.store import ExpertStore
from support.stores import tiny_store
from support.tiny import tiny_checkpoint, tiny_model

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def test_tokenizer_chat_template_and_generation_defaults_travel(tmp_path: Path):
    source = tiny_checkpoint("mixtral", tmp_path / "checkpoint", num_hidden_layers=1)
    words = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="?")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=[2, 5]).save_pretrained(source)

    prepare(source, tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store", verify=True)
    assert load_tokenizer(store)("hello world").input_ids == [0, 1]
    assert load_tokenizer(store).chat_template == TEMPLATE
    assert load_generation_config(store).temperature == 0.25
    assert load_skeleton(store, device="cpu").generation_config.eos_token_id == [2, 5]


def test_generation_defaults_come_from_the_configuration_where_there_is_no_file(tmp_path: Path):
    source = tiny_checkpoint("mixtral", tmp_path / "checkpoint", num_hidden_layers=1, eos_token_id=7)
    (source / "generation_config.json").unlink()
    prepare(source, tmp_path / "store")
    assert load_generation_config(ExpertStore.open(tmp_path / "store", verify=False)).eos_token_id == 7


def test_no_tokenizer(tmp_path: Path):
    prepare(tiny_checkpoint("mixtral", tmp_path / "checkpoint", num_hidden_layers=1), tmp_path / "store")
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(ExpertStore.open(tmp_path / "store", verify=False))


def test_tokens_of_the_checkpoint_in_another_dtype_than_its_configuration(tmp_path: Path):
    """The configuration's dtype wins, as with from_pretrained(dtype="auto")."""
    model = tiny_model("mixtral", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    manifest = prepare(tmp_path / "checkpoint", tmp_path / "store")
    assert manifest.dtype == "bfloat16"
    assert {field.dtype for field in manifest.record} == {"bfloat16"}
    store = ExpertStore.open(tmp_path / "store", verify=True)
    expected = model.model.layers[0].mlp.experts.down_proj[3].bfloat16()
    assert store.fields(store.record(0, 3))["down_proj"].equal(expected)


def test_two_threads_may_build_at_once(tmp_path: Path) -> None:
    """transformers replaces functions of torch while it builds; left replaced, they would spoil every later model."""
    store = ExpertStore.open(tiny_store("mixtral", tmp_path), verify=False)
    functions = {name: getattr(torch, name) for name in ("linspace", "arange", "empty", "zeros", "tensor")}
    initialisers = {name: value for name, value in vars(torch.nn.init).items() if callable(value)}
    want = dict(load_skeleton(store, device="cpu").named_buffers())
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load_skeleton(store, device="cpu"), range(12)))
    for model in models:
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, want[name]), name
    assert torch.get_default_dtype() is torch.float32
    assert all(getattr(torch, name) is value for name, value in functions.items())
    assert all(getattr(torch.nn.init, name) is value for name, value in initialisers.items())
