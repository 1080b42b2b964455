"""The states a slot can be in, and the table of slots with its two indices. Pure; no bytes move here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from odmoe_node.events import ExpertKey


@dataclass(frozen=True, slots=True)
class Free:
    """Holds nothing and accounts for no bytes."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Its load is in flight. `on_demand`: no forecast or certain order had asked for it when it began.
    `unwanted`: nobody wants it any more. `stopping`: it was broken off, but may come to its end before it hears.
    `used`: some compute was `Riding` on it, and has ended."""

    key: ExpertKey
    on_demand: bool
    began_s: float
    unwanted: bool = False
    stopping: bool = False
    used: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """Holds an expert that is wanted. `used`: some compute has had it; `used_s` is when it last had, or when it was
    loaded."""

    key: ExpertKey
    used: bool
    used_s: float


@dataclass(frozen=True, slots=True)
class Resting:
    """Holds an expert nobody wants at present, until room is needed; see `Ready`."""

    key: ExpertKey
    used: bool
    used_s: float


@dataclass(frozen=True, slots=True)
class Computing:
    """Its expert is being computed (or is in the worker's queue) for the request. `number` is the node's own,
    never used twice. `is_whole`: its load brought it."""

    key: ExpertKey
    request_id: int
    number: int
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Riding:
    """Loading and being computed at once, as the bytes arrive; either may end first. See `Loading` and `Computing`."""

    key: ExpertKey
    on_demand: bool
    began_s: float
    request_id: int
    number: int


Slot = Free | Loading | Ready | Resting | Computing | Riding
FREE = Free()
S = TypeVar("S", Loading, Resting)


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
        """Loads in flight, those that a compute rides on too."""
        return self._loading

    def occupied(self) -> list[int]:
        return list(self._by_key.values())

    def loading(self) -> dict[int, Loading]:
        """Those that no compute rides on."""
        return self._in_state(Loading) if self._loading else {}

    def resting(self) -> dict[int, Resting]:
        return self._in_state(Resting)

    def whole(self) -> list[ExpertKey]:
        """Experts whose load has brought them, and that are in a slot still."""
        return [key for key, slot in self._by_key.items() if _is_whole(self._slots[slot])]

    def was_used(self, key: ExpertKey) -> bool:
        """Whether some compute has had, or is having, what lies in the expert's slot."""
        match self.find(key):
            case Ready(used=used) | Resting(used=used) | Loading(used=used):
                return used
            case Computing() | Riding():
                return True
            case _:
                return False

    def find(self, key: ExpertKey) -> Slot | None:
        slot = self._by_key.get(key)
        return None if slot is None else self._slots[slot]

    def any_free(self) -> int | None:
        return self._free[-1] if self._free else None

    def put(self, slot: int, state: Slot) -> None:
        """Bring a slot into another state; a slot changes its key only by way of `Free`."""
        before = self._slots[slot]
        self._loading += isinstance(state, Loading | Riding) - isinstance(before, Loading | Riding)
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

    def _in_state(self, kind: type[S]) -> dict[int, S]:
        return {slot: state for slot in self._by_key.values() if isinstance(state := self._slots[slot], kind)}

    def check_integrity(self) -> None:
        """Assert that no key is in two slots and that the indices tell the truth."""
        held = {slot: state.key for slot, state in self if not isinstance(state, Free)}
        assert len(set(held.values())) == len(held), f"a key in two slots: {held}"
        assert {key: slot for slot, key in held.items()} == self._by_key
        assert sorted(self._free) == sorted(set(range(len(self))) - set(held))
        assert self._loading == sum(isinstance(state, Loading | Riding) for _, state in self)


def _is_whole(state: Slot) -> bool:
    return isinstance(state, Ready | Resting) or (isinstance(state, Computing) and state.is_whole)
