"""What a node finds out about its own link, and that it says so."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq
from torch import Tensor

from odmoe_model.store import ExpertStore
from odmoe_node.build import build_agent
from odmoe_node.config import NodeSettings
from odmoe_node.load_time import ENOUGH_S, MAX_TRIES, try_load_us
from odmoe_node.stopping import Stop
from support.stores import tiny_store


class ScriptedBank:
    """Loads take what they are told to, on a clock of their own."""

    record_bytes = slot_bytes = arena_bytes = 1000

    def __init__(self, *takes_s: float, broken: bool = False) -> None:
        self.now_s = 0.0
        self.loads = 0
        self._takes_s = itertools.cycle(takes_s)
        self._broken = broken

    def load(self, slot: int, layer: int, expert: int, *, stop: Stop | None = None) -> float:
        if self._broken:
            raise OSError(5, "Input/output error")
        self.loads += 1
        took_s = next(self._takes_s)
        self.now_s += took_s
        return took_s

    def rows(self, slot: int, x_NH: Tensor, runs: Sequence[int] = ()) -> Tensor:
        raise AssertionError("nothing is computed")

    def clock(self) -> float:
        return self.now_s


def test_the_quickest_of_a_few_counts() -> None:
    bank = ScriptedBank(0.009, 0.001, 0.004)
    assert try_load_us(bank, clock=bank.clock) == 1000
    assert bank.loads == MAX_TRIES


def test_a_slow_link_is_tried_once() -> None:
    bank = ScriptedBank(20 * ENOUGH_S)
    assert try_load_us(bank, clock=bank.clock) == round(20e6 * ENOUGH_S)
    assert bank.loads == 1


def test_an_expert_that_cannot_be_loaded_leaves_it_not_known() -> None:
    assert try_load_us(ScriptedBank(0.001, broken=True)) == 0


def test_a_slot_for_slices_is_not_taken_for_a_fast_link() -> None:
    bank = ScriptedBank(0.001)
    bank.slot_bytes = 250
    assert try_load_us(bank, clock=bank.clock) == 4000


@pytest.fixture(scope="module")
def store_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store("mixtral", tmp_path_factory.mktemp("load-time"))


def hello_load_us(directory: Path, tmp_path: Path, **settings: Any) -> int:
    """What a node with these settings says a load takes it."""
    endpoint = f"ipc://{tmp_path}/nobody"
    with zmq.Context[zmq.Socket[bytes]]() as context:
        agent = build_agent(
            NodeSettings(store=directory, server_endpoint=endpoint, **settings), node_id="n", context=context
        )
        agent.stop()
        agent.run()
    return agent._hello.load_us


def test_a_node_says_what_a_load_takes_it(store_directory: Path, tmp_path: Path) -> None:
    assert hello_load_us(store_directory, tmp_path, device="cpu") > 0


def test_an_emulated_link_takes_exactly_its_time(store_directory: Path, tmp_path: Path) -> None:
    record_bytes = ExpertStore.open(store_directory, verify=False).manifest.record_bytes
    assert hello_load_us(store_directory, tmp_path, device="emulated", link_gbps=0.001) == record_bytes
