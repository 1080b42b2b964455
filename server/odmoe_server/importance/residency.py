"""Which experts lie in which node's slots, as the nodes say. Pure.

All slots of all nodes that can be counted on are one cache. A node's own word replaces whatever was believed of it; in
between, what is ordered is taken to happen. Written on the cluster's thread, one entry of a dict at a time, so that
the decode loop may look at it without a lock.
"""

from collections.abc import Iterable, Sequence

from odmoe_server.importance.cpu_share import Costs
from odmoe_server.importance.history import Key
from odmoe_wire.homes import homes
from odmoe_wire.messages import ExpertRef, Member


class Residency:
    """`members`: who takes part, as of `epoch`. `reachable`: those of them no answer of whom is overdue. `costs`: what
    loads take."""

    def __init__(self) -> None:
        self.members: tuple[Member, ...] = ()
        self.reachable: tuple[Member, ...] = ()
        self.epoch = -1
        self.costs = Costs()
        self._held: dict[str, frozenset[Key]] = {}

    # --------------------------------------------------------------------------------- on the cluster's thread

    def take_part(self, members: Sequence[Member], *, suspects: frozenset[str], epoch: int) -> None:
        """Who takes part now. What is known of others is forgotten."""
        self.epoch = epoch
        self.members = tuple(members)
        self.reachable = tuple(member for member in members if member.node_id not in suspects)
        present = {member.node_id for member in members}
        for node_id in [known for known in self._held if known not in present]:
            del self._held[node_id]

    def reported(self, node_id: str, held: Iterable[ExpertRef]) -> None:
        """A node says what it holds."""
        self._held[node_id] = frozenset(Key(ref.layer, ref.expert) for ref in held)

    def make_room(self, node_id: str, *, num_loads: int, leaving: Iterable[ExpertRef]) -> None:
        """A node was told to load so many experts: what has to go for them is not counted on any more."""
        held = self._held.get(node_id, frozenset())
        slots = next((member.slots for member in self.members if member.node_id == node_id), 0)
        going = [key for ref in leaving if (key := Key(ref.layer, ref.expert)) in held]
        self._held[node_id] = held.difference(going[: max(0, len(held) + num_loads - slots)])

    # -------------------------------------------------------------------------------------- from any thread

    def on(self, node_id: str) -> frozenset[Key]:
        """What lies in a node's slots."""
        return self._held.get(node_id, frozenset())

    def holders(self, layer: int) -> dict[int, str]:
        """Expert -> node, of the experts of a layer that lie in slots of reachable nodes; of several the first."""
        found: dict[int, str] = {}
        for member in self.reachable:
            for key in self.on(member.node_id):
                if key.layer == layer:
                    found.setdefault(key.expert, member.node_id)
        return found

    def places(self, layer: int, experts: Iterable[int]) -> dict[int, str]:
        """Expert -> node: who holds it, else where it is at home; empty when nobody takes part."""
        at_home = homes(layer, experts, self.reachable or self.members)
        holders = self.holders(layer)
        return {expert: holders.get(expert, node_id) for expert, node_id in at_home.items()}
