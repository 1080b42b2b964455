"""The manifest: layout of records, digest, and what a damaged one is told."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odmoe_model.manifest import (
    ALIGNMENT_BYTES,
    LayerFile,
    Manifest,
    StoredFile,
    StoreError,
    plan_record,
    read_manifest,
    write_manifest,
)

DTYPES = ["float32", "float16", "bfloat16", "int8"]


def manifest(**changes: object) -> Manifest:
    record, record_bytes = plan_record([("gate_up_proj", "bfloat16", (6, 4)), ("down_proj", "bfloat16", (4, 3))])
    files = [StoredFile(file=f"experts-{i}", bytes=64 + 8 * record_bytes, sha256="0" * 64) for i in range(2)]
    values = {
        "model_type": "mixtral",
        "config": {"model_type": "mixtral", "rope_theta": 1e6, "nested": {"b": [1, 2.5], "a": None}},
        "dtype": "bfloat16",
        "hidden_size": 4,
        "num_experts": 8,
        "top_k": 2,
        "record": record,
        "record_bytes": record_bytes,
        "layers": tuple(
            LayerFile(layer=i, decoder_layer=i + 1, module=f"layers.{i + 1}", stored=file, data_offset=64)
            for i, file in enumerate(files)
        ),
        "non_expert": StoredFile(file="rest", bytes=10, sha256="1" * 64),
        "other_files": (StoredFile(file="tokenizer.json", bytes=10, sha256="2" * 64),),
    }
    return Manifest(**{**values, **changes})


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1, max_size=5
    )
)
def test_fields_of_a_record_are_aligned_in_order_and_apart(shapes):
    parameters = [(f"p{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)]
    record, record_bytes = plan_record(parameters)
    assert [(field.name, field.dtype, field.shape) for field in record] == parameters
    ends = [0, *(field.offset + field.size_bytes for field in record)]
    for field, former_end in zip(record, ends, strict=False):
        assert field.offset % ALIGNMENT_BYTES == 0
        assert 0 <= field.offset - former_end < ALIGNMENT_BYTES
    assert record_bytes % ALIGNMENT_BYTES == 0
    assert 0 <= record_bytes - ends[-1] < ALIGNMENT_BYTES


def test_written_and_read_again_is_the_same(tmp_path: Path):
    write_manifest(manifest(), tmp_path)
    assert read_manifest(tmp_path) == manifest()
    assert read_manifest(tmp_path).digest == manifest().digest


def test_digest_stands_for_content_not_for_order_of_keys():
    reordered = manifest(config=dict(reversed(manifest().config.items())))
    assert reordered.digest == manifest().digest
    other_weights = manifest(non_expert=StoredFile(file="rest", bytes=10, sha256="3" * 64))
    other_config = manifest(config={**manifest().config, "rope_theta": 1e4})
    assert len({manifest().digest, other_weights.digest, other_config.digest}) == 3


def test_no_store(tmp_path: Path):
    with pytest.raises(StoreError, match=r"not an expert store.*odmoe prepare"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (lambda m: m.update(format_version=99), "store format 99"),
        (lambda m: m.update(surprise=1), "damaged.*surprise"),
        (lambda m: m.pop("num_experts"), "damaged.*num_experts"),
        (lambda m: m.update(num_experts="eight"), "damaged"),
        (lambda m: m.update(num_experts=7), "layer 0 does not fit"),
        (lambda m: m.update(record_bytes=1), "damaged"),
        (lambda m: m["record"][1].update(offset=8), "layout does not add up"),
        (lambda m: m["record"][0].update(shape=[60, 4]), "layout does not add up"),
        (lambda m: m["layers"].pop(0), "layer 0 does not fit"),
        (lambda m: m.update(layers=[]), "no experts"),
        (lambda m: m["non_expert"].update(file="../../etc/passwd"), "not a plain file name"),
        (lambda m: m["layers"][0]["stored"].update(file="/etc/passwd"), "not a plain file name"),
    ],
)
def test_damaged_manifest(tmp_path: Path, spoil, pattern: str):
    path = write_manifest(manifest(), tmp_path)
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=pattern):
        read_manifest(tmp_path)


def test_manifest_that_is_no_json(tmp_path: Path):
    (tmp_path / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(StoreError, match="damaged"):
        read_manifest(tmp_path)
