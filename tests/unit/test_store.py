"""A store opened for reading: views, alignment, and files that changed since it was made."""

import shutil
from pathlib import Path

import pytest
import torch

from odmoe_model.manifest import ALIGNMENT_BYTES
from odmoe_model.store import ExpertStore, StoreError
from support.stores import tiny_store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Odd sizes, biases, transposed: the hardest record there is.
    directory = tmp_path_factory.mktemp("gpt_oss")
    return tiny_store("gpt_oss", directory, num_hidden_layers=2, intermediate_size=25, num_local_experts=3)


@pytest.fixture
def store_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def test_records_and_fields_are_aligned_views(made: Path):
    store = ExpertStore.open(made, verify=True)
    for layer in range(store.manifest.num_moe_layers):
        for expert in range(store.manifest.num_experts):
            record = store.record(layer, expert)
            assert (record.dtype, record.shape) == (torch.uint8, (store.manifest.record_bytes,))
            assert record.data_ptr() == store.record(layer, expert).data_ptr(), "copied"
            for tensor in store.fields(record).values():
                assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
                assert tensor.untyped_storage().data_ptr() == record.untyped_storage().data_ptr(), "copied"
    assert list(store.fields(store.record(0, 0))) == [field.name for field in store.manifest.record]


def test_fields_of_a_copied_record_are_the_same(made: Path):
    store = ExpertStore.open(made, verify=False)
    arena = torch.zeros(3 * store.manifest.record_bytes, dtype=torch.uint8)
    slot = arena[store.manifest.record_bytes : 2 * store.manifest.record_bytes]
    slot.copy_(store.record(1, 2))
    for name, tensor in store.fields(slot).items():
        assert torch.equal(tensor, store.fields(store.record(1, 2))[name])


def test_writing_to_a_record_does_not_reach_the_file(made: Path):
    store = ExpertStore.open(made, verify=False)
    store.record(0, 0).zero_()
    ExpertStore.open(made, verify=True)


def test_non_expert_weights_hold_no_experts(made: Path):
    store = ExpertStore.open(made, verify=False)
    names = set(store.non_expert())
    assert "model.embed_tokens.weight" in names
    assert not [name for name in names if ".experts." in name]


@pytest.mark.parametrize("which", ["experts-00001.safetensors", "non_expert.safetensors", "config.json"])
def test_altered_file_is_named(store_dir: Path, which: str):
    raw = bytearray((store_dir / which).read_bytes())
    raw[len(raw) // 2] ^= 1
    (store_dir / which).write_bytes(raw)
    ExpertStore.open(store_dir, verify=False)
    with pytest.raises(StoreError, match=f"{which} was altered.*prepare the store again"):
        ExpertStore.open(store_dir, verify=True)


def test_truncated_file_is_named_even_unverified(store_dir: Path):
    path = store_dir / "experts-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"{path.name} was truncated"):
        ExpertStore.open(store_dir, verify=False)


def test_missing_file_is_named(store_dir: Path):
    (store_dir / "non_expert.safetensors").unlink()
    with pytest.raises(StoreError, match=r"non_expert\.safetensors cannot be read"):
        ExpertStore.open(store_dir, verify=False)
