"""The states a slot can be in, and the table of slots with its two indices. Pure; no bytes move here."""

from collections.abc import Iterator
from dataclasses import dataclass

from odmoe_node.events import ExpertKey


@dataclass(frozen=True, slots=True)
class Free:
    """Holds nothing and accounts for no bytes."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Its load is in flight. `unwanted`: nobody wants it any more, but a load is never aborted midway, so
    the slot is freed when it ends. `on_demand`: no forecast or certain order had asked for it when it
    began."""

    key: ExpertKey
    on_demand: bool
    unwanted: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """Holds the expert; `used` once some compute has had it."""

    key: ExpertKey
    used: bool = False


@dataclass(frozen=True, slots=True)
class Computing:
    """Its expert is being computed (or is in the worker's queue) for the request. `number` is the node's own,
    never used twice."""

    key: ExpertKey
    request_id: int
    number: int


Slot = Free | Loading | Ready | Computing
FREE = Free()


class SlotTable:
    """Slot numbers to states; every occupied slot is found by its key."""

    def __init__(self, num_slots: int) -> None:
        self._slots: list[Slot] = [FREE] * num_slots
        self._by_key: dict[ExpertKey, int] = {}
        self._free = list(range(num_slots))[::-1]
        self._loading = 0

    def __getitem__(self, slot: int) -> Slot:
        return self._slots[slot]

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __iter__(self) -> Iterator[tuple[int, Slot]]:
        return iter(enumerate(self._slots))

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def num_used(self) -> int:
        return len(self._by_key)

    @property
    def num_loading(self) -> int:
        return self._loading

    def occupied(self) -> list[int]:
        return list(self._by_key.values())

    def find(self, key: ExpertKey) -> Slot | None:
        slot = self._by_key.get(key)
        return None if slot is None else self._slots[slot]

    def any_free(self) -> int | None:
        return self._free[-1] if self._free else None

    def put(self, slot: int, state: Slot) -> None:
        """Bring a slot into another state; a slot changes its key only by way of `Free`."""
        before = self._slots[slot]
        self._loading += isinstance(state, Loading) - isinstance(before, Loading)
        if isinstance(before, Free):
            assert not isinstance(state, Free), f"slot {slot} is free already"
            assert state.key not in self._by_key, f"{state.key} is in a slot already"
            self._free.remove(slot)
            self._by_key[state.key] = slot
        elif isinstance(state, Free):
            del self._by_key[before.key]
            self._free.append(slot)
        else:
            assert before.key == state.key, f"slot {slot} changes from {before} to {state}"
        self._slots[slot] = state

    def check_integrity(self) -> None:
        """Assert that no key is in two slots and that the indices tell the truth."""
        held = {slot: state.key for slot, state in self if not isinstance(state, Free)}
        assert len(set(held.values())) == len(held), f"a key in two slots: {held}"
        assert {key: slot for slot, key in held.items()} == self._by_key
        assert sorted(self._free) == sorted(set(range(len(self))) - set(held))
        assert self._loading == sum(isinstance(state, Loading) for _, state in self)
