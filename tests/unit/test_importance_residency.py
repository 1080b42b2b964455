"""What the server believes of all slots, and what dispatch makes of importance mode's orders. Pure."""

import pytest

from odmoe_server.cluster.dispatch import assign
from odmoe_server.cluster.events import FetchAhead, LayerCall, Send, SendCompute
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_server.importance.history import Key
from odmoe_server.importance.residency import Residency
from odmoe_wire.homes import homes
from odmoe_wire.messages import ExpertRef, Load, Member, Release, Span

MEMBERS = (Member("a", 2), Member("b", 2), Member("c", 2))
SPAN = Span(1, 5)
NOBODY: frozenset[str] = frozenset()


def refs(*pairs: tuple[int, int]) -> list[ExpertRef]:
    return [ExpertRef(*pair) for pair in pairs]


def residency(*, suspects: frozenset[str] = NOBODY) -> Residency:
    """a holds expert 4 of layers 0 and 1, b expert 6 of layer 0."""
    known = Residency()
    known.take_part(MEMBERS, suspects=suspects, epoch=1)
    known.reported("a", refs((0, 4), (1, 4)))
    known.reported("b", refs((0, 6)))
    return known


def test_the_slots_of_all_nodes_are_one_cache() -> None:
    assert residency().holders(0) == {4: "a", 6: "b"}
    assert residency().holders(1) == {4: "a"}
    assert residency().holders(2) == {}


def test_an_expert_is_sought_where_it_lies_and_else_at_home() -> None:
    at_home = homes(0, range(8), MEMBERS)
    assert at_home[4] != "a", "else this would show nothing"
    assert residency().places(0, [4, 5, 6]) == {4: "a", 5: at_home[5], 6: "b"}
    assert Residency().places(0, [4]) == {}


def test_a_node_that_does_not_answer_holds_nothing_for_us() -> None:
    known = residency(suspects=frozenset({"a"}))
    assert known.holders(0) == {6: "b"}
    assert set(known.places(0, range(8)).values()) == {"b", "c"}
    known.take_part(MEMBERS, suspects=NOBODY, epoch=1)
    assert known.holders(0) == {4: "a", 6: "b"}, "it is back, with what it had"


def test_where_all_are_suspects_they_are_asked_all_the_same() -> None:
    known = residency(suspects=frozenset("abc"))
    assert known.holders(0) == {}
    assert known.places(0, range(8)) == homes(0, range(8), MEMBERS)


def test_a_node_that_left_is_forgotten() -> None:
    known = residency()
    known.take_part(MEMBERS[1:], suspects=NOBODY, epoch=2)
    known.take_part(MEMBERS, suspects=NOBODY, epoch=3)
    assert known.on("a") == frozenset()


def test_what_has_to_go_for_a_load_is_not_counted_on_until_the_node_speaks() -> None:
    known = residency()
    known.make_room("b", num_loads=1, leaving=refs((0, 6)))
    assert known.on("b") == {Key(0, 6)}, "it has a slot to spare"
    known.make_room("a", num_loads=1, leaving=refs((3, 3), (1, 4), (0, 4)))
    assert known.on("a") == {Key(0, 4)}, "one has to go; 3/3 is not there"
    known.reported("a", refs((0, 4), (1, 4)))
    assert known.on("a") == {Key(0, 4), Key(1, 4)}, "the node's own word"


# ------------------------------------------------------------------------------------------------------- dispatch


def config() -> ClusterConfig:
    return ClusterConfig(
        store_digest="d", package_version="1", num_layers=4, num_experts=8, group_size=2, mode="importance"
    )


def call(where: dict[int, str]) -> LayerCall:
    return LayerCall(call_id=1, spans=(SPAN,), layer=0, counts={4: 1, 5: 1}, where=where)


@pytest.mark.parametrize("predicted", [frozenset[int](), frozenset({4, 5})])
def test_the_call_says_where_as_far_as_those_nodes_are_there(predicted: frozenset[int]) -> None:
    at_home = homes(0, [4, 5], MEMBERS)
    members = list(MEMBERS)
    assert assign(call({4: "a", 5: "a"}), predicted, members, config()) == {4: "a", 5: "a"}
    assert assign(call({4: "gone"}), predicted, members, config()) == at_home
    assert assign(call({4: "a"}), predicted, [], config()) == {}


def test_who_was_told_to_fetch_is_told_when_it_was_for_nothing() -> None:
    state = ClusterState(config=config())
    dispatch, members = state.dispatch, list(MEMBERS)
    event = FetchAhead(spans=(SPAN,), layer=2, where={4: "a", 5: "b", 6: "gone"}, leaving={"a": tuple(refs((0, 1)))})
    loads = dispatch.fetch(event, members, epoch=1)
    assert loads == [
        Send(peer_id="a", message=Load(spans=[SPAN], layer=2, experts=[4], leaving=refs((0, 1))), epoch=1),
        Send(peer_id="b", message=Load(spans=[SPAN], layer=2, experts=[5]), epoch=1),
    ]
    asked = LayerCall(call_id=1, spans=(SPAN,), layer=2, counts={4: 1}, where={4: "a"})
    actions = dispatch.begin(asked, members, epoch=1, now=0.0)
    released = [
        action.peer_id for action in actions if isinstance(action, Send) and isinstance(action.message, Release)
    ]
    assert released == ["b"]
    again = LayerCall(call_id=2, spans=(SPAN,), layer=2, counts={4: 1}, where={4: "a"})
    actions = dispatch.begin(again, members, epoch=1, now=0.0)
    assert not [action for action in actions if isinstance(action, Send)]


def test_what_goes_first_travels_with_the_compute() -> None:
    dispatch = ClusterState(config=config()).dispatch
    asked = LayerCall(
        call_id=1,
        spans=(SPAN,),
        layer=0,
        counts={4: 1, 5: 1},
        where={4: "a", 5: "b"},
        leaving={"b": tuple(refs((1, 1), (2, 2)))},
    )
    sent = {
        action.peer_id: action.message.leaving
        for action in dispatch.begin(asked, list(MEMBERS), epoch=1, now=0.0)
        if isinstance(action, SendCompute)
    }
    assert sent == {"a": [], "b": refs((1, 1), (2, 2))}
