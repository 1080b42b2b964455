"""How large a sequence becomes, and who has room: by hand, and held against real caches of every family."""

from pathlib import Path

import pytest
import torch

from odmoe_model.family import SUPPORTED_FAMILIES
from odmoe_model.kvcache import cache_bytes, new_cache, trim_cache
from odmoe_model.seam import install
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore
from odmoe_server.engine.kv import KvSize, Room, _no_experts, default_budget_bytes, measure_kv
from odmoe_server.moe.lanes import Lane, meet, run_lanes
from support.stores import tiny_store


def test_windows_stop_growing() -> None:
    size = KvSize(layers=((10, None), (10, 4)))
    assert [size.bytes_for(positions) for positions in (1, 4, 100)] == [20, 80, 1040]


def test_the_logits_of_one_chunk_are_there_at_a_time() -> None:
    size = KvSize(layers=(), logits_row=100)
    assert [size.bytes_of_reading(num, chunk=16) for num in (5, 16, 50)] == [500, 1600, 1600]
    assert size.bytes_of_reading(50, chunk=None) == 5000


def test_the_longest_sequence_that_fits() -> None:
    size = KvSize(layers=((10, None), (10, 4)))
    assert [size.positions_in(budget, most=50) for budget in (0, 19, 20, 79, 80, 90, 10_000)] == [0, 0, 1, 3, 4, 5, 50]


def test_room_is_reserved_and_given_back() -> None:
    room = Room(budget_bytes=100, max_running=2)
    assert room.admit(1, 60)
    assert not room.admit(2, 41)
    assert room.admit(2, 40)
    assert not room.admit(3, 0), "no more than max_running"
    room.leave(1)
    assert not room.admit(3, 50, beside_bytes=20)
    assert room.admit(3, 50, beside_bytes=10)
    assert room.reserved_bytes == 90
    room.leave(7)
    assert room.reserved_bytes == 90


def test_the_default_budget_is_a_share_of_what_is_free() -> None:
    assert 0 < default_budget_bytes("cpu") < 1 << 42


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_no_cache_becomes_larger_than_was_reserved(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = load_skeleton(ExpertStore.open(tiny_store(family, tmp_path), verify=False), device="cpu")
    install(model, meet)
    size = measure_kv(model, lambda: new_cache(model.config))
    cache = new_cache(model.config)
    for length in (40, 41, 42):
        ids = [1] * (length - cache.get_seq_length())
        run_lanes(model, [Lane(sequence=1, position=length - len(ids), ids=ids, cache=cache)], _no_experts)
        trim_cache(cache)
        assert cache_bytes(cache) <= size.bytes_for(length)
        assert cache_bytes(cache) >= 0.5 * size.bytes_for(length), "what is reserved is not far more than is used"
