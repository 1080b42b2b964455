"""Mode "lru": experts stay in their slots until room is needed. Pure."""

from odmoe_node.events import ComputeBroke, ServerLost
from odmoe_node.eviction import choose_victim
from odmoe_node.slots import Resting
from odmoe_wire.messages import Span
from support.node_rig import SLOT_BYTES, NodeRig


def resting_node(*, num_slots: int) -> NodeRig:
    node = NodeRig(num_slots=num_slots)
    node.view(epoch=1, mode="lru")
    return node


def use(node: NodeRig, *experts: int, layer: int = 0) -> None:
    """One compute after the other, each to its end."""
    for expert in experts:
        node.compute(layer, [expert])
        node.finish()


def test_the_victim_is_the_one_used_longest_ago() -> None:
    resting = {3: Resting((0, 1), used=True, used_s=5.0), 1: Resting((0, 2), used=True, used_s=4.0)}  # type: ignore[arg-type]
    assert choose_victim(resting, {}) == 1


def test_a_computed_expert_stays_and_is_a_hit_the_next_time() -> None:
    node = resting_node(num_slots=2)
    use(node, 4)
    assert node.held == {(0, 4)}
    assert node.state.accounted_bytes == SLOT_BYTES
    node.compute(0, [4], position=1)
    assert node.loading == []
    node.finish()
    assert node.outcomes() == {4: "hit"}
    assert node.state.counters.loads == 1


def test_the_least_recently_used_gives_way_when_room_is_needed_and_not_before() -> None:
    node = resting_node(num_slots=3)
    use(node, 0, 1, 0)
    assert node.held == {(0, 0), (0, 1)}
    use(node, 2)
    assert node.held == {(0, 0), (0, 1), (0, 2)}
    use(node, 3)
    assert node.held == {(0, 0), (0, 2), (0, 3)}
    assert node.state.counters.loads_unused == 0


def test_forecasts_take_the_room_of_resting_experts_too_and_find_them_there() -> None:
    node = resting_node(num_slots=2)
    use(node, 0, 1)
    node.forecast(0, [0, 5], position=1)
    assert node.load_keys == [(0, 5)]
    node.finish()
    assert node.held == {(0, 0), (0, 5)}, "expert 1 was used later, but expert 0 is wanted"
    node.forecast(1, [7], position=1)
    assert node.loading == [], "what is wanted sooner does not give way"
    node.compute(0, [0, 5], position=1)
    node.finish()
    assert node.outcomes() == {0: "hit", 5: "hit"}
    assert (1, 7) in node.held


def test_a_need_takes_a_resting_experts_room_rather_than_a_forecasts() -> None:
    node = resting_node(num_slots=2)
    use(node, 0)
    node.forecast(9, [1])
    node.finish()
    use(node, 2)
    assert node.held == {(9, 1), (0, 2)}


def test_a_forecast_the_gate_refutes_rests_and_counts_as_unused_when_it_goes() -> None:
    node = resting_node(num_slots=2)
    node.forecast(0, [3])
    node.end_load()
    node.release(0)
    assert node.held == {(0, 3)}
    assert node.state.counters.loads_unused == 0
    use(node, 1, 2, layer=1)
    assert (0, 3) not in node.held
    assert node.state.counters.loads_unused == 1


def test_an_unwanted_load_rests_when_it_ends() -> None:
    node = resting_node(num_slots=2)
    node.forecast(0, [3])
    node.release(0)
    node.end_load()
    assert node.held == {(0, 3)}


def test_an_expert_whose_compute_broke_rests_like_any_other() -> None:
    node = resting_node(num_slots=1)
    node.compute(0, [1])
    node.end_load()
    node.event(ComputeBroke(node.computing.pop().slot, "wrong width"))
    assert node.held == {(0, 1)}


def test_cancel_and_release_leave_the_cache_alone() -> None:
    node = resting_node(num_slots=3)
    use(node, 0)
    node.forecast(0, [1], position=1)
    node.finish()
    node.release(0, position=1)
    node.cancel()
    assert node.held == {(0, 0), (0, 1)}
    node.compute(0, [0], spans=[Span(2, 0, 1)])
    node.finish()
    assert node.outcomes() == {0: "hit"}


def test_back_to_on_demand_frees_what_rests_but_not_what_is_wanted() -> None:
    node = resting_node(num_slots=3)
    use(node, 0)
    node.forecast(1, [1])
    node.finish()
    node.view(epoch=2, mode="on-demand")
    assert node.held == {(1, 1)}
    node.compute(1, [1], epoch=2)
    node.finish()
    assert node.held == set()


def test_lru_from_now_on_keeps_what_is_computed_from_now_on() -> None:
    node = NodeRig(num_slots=2)
    use(node, 0)
    assert node.held == set()
    node.view(epoch=2, mode="lru")
    use(node, 0)
    assert node.held == {(0, 0)}


def test_a_lost_server_leaves_nothing_resting_and_the_next_one_decides_anew() -> None:
    node = resting_node(num_slots=2)
    use(node, 0)
    node.event(ServerLost())
    assert node.held == set()
    node.join(epoch=1)
    use(node, 0)
    assert node.held == set()


def test_another_server_that_is_there_already_finds_what_rests() -> None:
    node = NodeRig(num_slots=2, joined=False)
    node.join(epoch=9)
    node.view(epoch=9, mode="lru")
    node.compute(0, [0], epoch=9)
    node.finish()
    node.view(epoch=1, mode="lru")
    assert node.held == {(0, 0)}, "weights are the same whoever asks"


def test_an_older_compute_gets_the_room_of_a_resting_expert() -> None:
    """Patience is for slots that are all in use: here the older compute need not take a younger one's."""
    node = resting_node(num_slots=2)
    use(node, 7)
    node.compute(0, [0, 1])
    node.end_load()
    assert node.load_keys == [(0, 1)]
    assert (0, 7) not in node.held
    node.finish()
    assert len(node.answers) == 2
