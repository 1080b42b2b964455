"""A store whose file is cut short or altered under a running node: no crash, a message, and others can go on."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from odmoe_model.store import ExpertStore, StoreError
from odmoe_node.bank import open_bank
from odmoe_node.pages import fetch_pages
from odmoe_wire.messages import ComputeFailed, LoadFailed, Result
from support.node_loopback import NodeOnLoopback
from support.stores import tiny_store

ROW = {7: torch.ones(1, 64)}
LAST_LAYER = 2


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tiny_store("mixtral", tmp_path)


def layer_file(store_path: Path) -> Path:
    return store_path / ExpertStore.open(store_path, verify=False).manifest.layers[LAST_LAYER].stored.file


def test_a_file_cut_short_while_it_is_mapped_fails_the_load_and_not_the_process(store_path: Path) -> None:
    node = NodeOnLoopback(store_path, num_slots=2)
    file = layer_file(store_path)
    whole = file.read_bytes()
    os.truncate(file, len(whole) // 4)
    node.compute(LAST_LAYER, ROW, request_id=1)
    (failed,) = node.said(ComputeFailed)
    assert isinstance(failed, ComputeFailed)
    assert failed.code == "load_failed"
    assert "cut short" in failed.reason
    assert len(node.said(LoadFailed)) == 1
    node.compute(0, ROW, request_id=2)
    assert len(node.said(Result)) == 1, "the other layers are as good as before"
    with file.open("r+b") as mended:
        mended.write(whole)
    node.compute(LAST_LAYER, ROW, request_id=3)
    assert len(node.said(Result)) == 2, "and so is this one, once the file is whole"


def test_pages_that_are_there_are_fetched_and_those_that_are_not_are_an_error(store_path: Path) -> None:
    store = ExpertStore.open(store_path, verify=False)
    record_B = store.record(LAST_LAYER, 7)
    fetch_pages(record_B)
    fetch_pages(record_B[: record_B.numel() // 2].view(-1, 2)[:, 0])
    fetch_pages(record_B[:0])
    os.truncate(layer_file(store_path), 0)
    with pytest.raises(OSError, match="the disk fails") as failure:
        fetch_pages(record_B)
    assert failure.value.errno == errno.EFAULT


def test_a_file_cut_short_under_an_expert_in_a_slot_fails_what_asks_for_it(store_path: Path) -> None:
    bank = open_bank(ExpertStore.open(store_path, verify=False), num_slots=1, device="cpu")
    bank.load(0, LAST_LAYER, 7)
    os.truncate(layer_file(store_path), 0)
    with pytest.raises(OSError, match="cut short"):
        bank.rows(0, torch.zeros(1, 64))


def test_slices_too(store_path: Path) -> None:
    store = ExpertStore.open(store_path, verify=False)
    bank = open_bank(store, num_slots=1, device="cpu", budget_bytes=store.manifest.record_bytes // 2)
    bank.load(0, LAST_LAYER, 7)
    os.truncate(layer_file(store_path), 0)
    with pytest.raises(OSError, match="cut short"):
        bank.load(0, LAST_LAYER, 7)


def test_an_altered_file_is_refused_at_the_next_start(store_path: Path) -> None:
    file = layer_file(store_path)
    with file.open("r+b") as altered:
        altered.seek(-1, os.SEEK_END)
        last = altered.read(1)
        altered.seek(-1, os.SEEK_END)
        altered.write(bytes([last[0] ^ 1]))
    with pytest.raises(StoreError, match=rf"{re.escape(file.name)} was altered.*prepare the store again"):
        ExpertStore.open(store_path, verify=True)
