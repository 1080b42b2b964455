"""Mode "importance" on a node: the server says which experts leave their slots, the node says which it holds. Pure."""

from odmoe_node.events import ExpertKey, ServerLost
from odmoe_node.eviction import choose_victim, leaving_in_turn
from odmoe_node.slots import Resting
from odmoe_wire.messages import Compute, ExpertRef, Load, Span
from support.node_rig import NodeRig


def node_with(*experts: int, num_slots: int) -> NodeRig:
    """Experts of layer 0, used in this order."""
    node = NodeRig(num_slots=num_slots)
    node.view(epoch=1, mode="importance")
    for expert in experts:
        node.compute(0, [expert])
        node.finish()
    return node


def compute(node: NodeRig, expert: int, *leaving: int, layer: int = 0) -> None:
    node.tell(
        Compute(
            request_id=1000 + expert,
            spans=[Span(1, 1, 1)],
            layer=layer,
            experts=[expert],
            counts=[1],
            ttl_s=100.0,
            leaving=[ExpertRef(0, one) for one in leaving],
        ),
        epoch=1,
    )
    node.finish()


def test_the_first_named_goes_then_the_next_then_the_least_recently_used() -> None:
    resting = {slot: Resting(ExpertKey(0, slot), used=True, used_s=10.0 - slot) for slot in range(4)}
    order = leaving_in_turn([ExpertRef(0, 9), ExpertRef(0, 2), ExpertRef(0, 0)])
    assert choose_victim(resting, order) == 2
    assert choose_victim({slot: resting[slot] for slot in (0, 1, 3)}, order) == 0
    assert choose_victim({slot: resting[slot] for slot in (1, 3)}, order) == 3


def test_a_node_obeys_the_order_that_comes_with_a_compute() -> None:
    node = node_with(0, 1, 2, num_slots=3)
    compute(node, 5, 1)
    assert node.held == {(0, 0), (0, 2), (0, 5)}, "0 was used longest ago, but 1 was named"
    compute(node, 6)
    assert node.held == {(0, 2), (0, 5), (0, 6)}, "nobody who was named is here any more"


def test_the_order_that_comes_with_a_load_holds_until_the_next() -> None:
    node = node_with(0, 1, 2, num_slots=3)
    leaving = [ExpertRef(0, 2), ExpertRef(0, 1)]
    node.tell(Load(spans=[Span(1, 1, 1)], layer=1, experts=[4], leaving=leaving), epoch=1)
    node.finish()
    assert node.held == {(0, 0), (0, 1), (1, 4)}
    compute(node, 7)
    assert node.held == {(0, 0), (1, 4), (0, 7)}


def test_what_is_wanted_or_at_work_stays_whatever_the_order_says() -> None:
    node = node_with(0, 1, num_slots=2)
    node.load(1, [3], span=Span(1, 1, 1))
    node.finish()
    assert node.held == {(0, 1), (1, 3)}
    leaving = [ExpertRef(1, 3), ExpertRef(0, 1)]
    node.tell(Load(spans=[Span(1, 1, 1)], layer=1, experts=[4], leaving=leaving), epoch=1)
    node.finish()
    assert node.held == {(1, 3), (1, 4)}


def test_a_node_tells_the_whole_experts_it_holds_and_in_other_modes_nothing() -> None:
    node = node_with(0, 1, num_slots=3)
    node.compute(0, [2])
    assert set(node.state.held()) == {ExpertRef(0, 0), ExpertRef(0, 1)}, "2 is being loaded"
    node.end_load()
    assert set(node.state.held()) == {ExpertRef(0, 0), ExpertRef(0, 1), ExpertRef(0, 2)}, "2 is being computed"
    node.finish()
    other = NodeRig(num_slots=3)
    other.view(epoch=1, mode="lru")
    other.compute(0, [2])
    other.finish()
    assert other.held == {(0, 2)}
    assert other.state.held() == []


def test_a_server_that_is_gone_has_no_say_any_more() -> None:
    node = node_with(0, 1, num_slots=2)
    compute(node, 0, 0)
    node.event(ServerLost())
    node.finish()
    assert node.held == set()
    assert node.state.held() == []
