"""What the view says of nodes' speed: equal machines are equal in it, though they never measure quite the same."""

from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_server.cluster.events import Action, Send
from odmoe_server.cluster.peers import LIKE_WITHIN_PERCENT, ClusterConfig, Peers, kinds
from odmoe_wire.messages import Hello, Member, View
from odmoe_wire.placement import place

LAYERS = 12
CONFIG = ClusterConfig(store_digest="d1", package_version="1", num_layers=LAYERS, num_experts=8, group_size=2)


def hello(peer_id: str, load_us: int) -> Hello:
    return Hello(
        role="node",
        peer_id=peer_id,
        incarnation=1,
        package_version="1",
        store_digest="d1",
        slots=1,
        load_us=load_us,
    )


def view_of(load_us: list[int]) -> list[Member]:
    """What the last node to come is told of all."""
    peers = Peers(config=CONFIG)
    actions: list[Action] = []
    for number, us in enumerate(load_us):
        actions = peers.admit(f"n{number}", hello(f"n{number}", us), 0.0)
    views = [action.message for action in actions if isinstance(action, Send) and isinstance(action.message, View)]
    assert all(view.members == views[0].members for view in views)
    assert peers.members() == views[0].members
    return views[0].members


def placed(members: list[Member]) -> list[dict[int, str]]:
    return [place(layer, {1, 5}, members, CONFIG.group_size, LAYERS) for layer in range(LAYERS)]


@settings(deadline=None)  # a busy machine is no fault
@given(noise=st.lists(st.integers(0, LIKE_WITHIN_PERCENT), min_size=1, max_size=10), load_us=st.integers(10, 10**6))
def test_noise_below_the_quantum_changes_no_placement(noise: list[int], load_us: int) -> None:
    measured = [load_us * (100 + percent) // 100 for percent in noise]
    assert len({member.load_us for member in view_of(measured)}) == 1
    assert placed(view_of(measured)) == placed(view_of([load_us] * len(noise)))


@settings(deadline=None)  # a busy machine is no fault
@given(noise=st.lists(st.integers(0, LIKE_WITHIN_PERCENT), min_size=8, max_size=8))
def test_two_kinds_stay_two_kinds(noise: list[int]) -> None:
    """The fastest of each kind is as it is; what the others measure does not matter."""
    fast, slow = [1000, *(10 * (100 + percent) for percent in noise[1:4])], [2000, *(20 * (100 + p) for p in noise[5:])]
    assert placed(view_of(fast + slow)) == placed(view_of([1000] * 4 + [2000] * 4))


def test_a_chain_of_small_steps_does_not_make_all_equal() -> None:
    told = {0: 0, 100: 100, 110: 100, 125: 100, 126: 126, 157: 126, 158: 158}
    assert kinds([158, 110, 0, 126, 125, 100, 157, 110]) == told


def test_what_is_not_known_is_said_to_be_not_known() -> None:
    assert [member.load_us for member in view_of([0, 500, 0])] == [0, 500, 0]


def test_the_view_follows_who_comes_and_goes() -> None:
    peers = Peers(config=CONFIG)
    for number, us in enumerate((1000, 1100, 3000)):
        peers.admit(f"n{number}", hello(f"n{number}", us), 0.0)
    assert [member.load_us for member in peers.members()] == [1000, 1000, 3000]
    peers.remove("n0", reason="test")
    assert [(member.node_id, member.load_us) for member in peers.members()] == [("n1", 1100), ("n2", 3000)]
