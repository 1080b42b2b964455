"""Where experts live when slots are caches: one place each, shared out evenly, by slots. Pure."""

from collections import Counter

from odmoe_wire.homes import homes, placed
from odmoe_wire.messages import Member
from odmoe_wire.placement import place

EQUAL = [Member(f"n{i}", 2) for i in range(3)]
UNEVEN = [Member("a", 1), Member("b", 3)]


def test_a_home_depends_on_nothing_but_layer_and_expert() -> None:
    together = homes(2, range(8), EQUAL)
    assert all(homes(2, [expert], EQUAL) == {expert: together[expert]} for expert in range(8))
    assert homes(2, range(8), []) == {}


def test_homes_are_shared_out_evenly_within_a_layer_and_over_layers() -> None:
    of_layer = Counter(homes(1, range(8), EQUAL).values())
    assert max(of_layer.values()) - min(of_layer.values()) <= 1
    over_all = Counter(node_id for layer in range(6) for node_id in homes(layer, range(8), EQUAL).values())
    assert set(over_all.values()) == {16}


def test_who_has_more_slots_is_home_to_more() -> None:
    over_all = Counter(node_id for layer in range(4) for node_id in homes(layer, range(8), UNEVEN).values())
    assert over_all == {"a": 8, "b": 24}
    many = [Member("a", 10), Member("b", 30)]
    of_layer = Counter(homes(0, range(8), many).values())
    assert of_layer == {"a": 2, "b": 6}, "turns are spread, not strung together"


def test_the_mode_of_the_view_decides() -> None:
    assert placed(1, [2, 5], EQUAL, 2, mode="lru") == homes(1, [2, 5], EQUAL)
    assert placed(1, [2, 5], EQUAL, 2, mode="on-demand") == place(1, [2, 5], EQUAL, 2)
