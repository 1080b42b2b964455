"""One device with slots for experts and one link, in virtual time: what is in a slot when a gate asks, and how long a
layer takes. Pure: it is told what gates said, and applies the rules of `odmoe_server.importance`.

Hits, loads and what stands in slots are exact; times are computed from the seconds that single things take. A step's
layer goes `gate`, then `serve`, then perhaps `foresee`. Between two gates the link works off what was foreseen, and
what it has not begun by the next gate is dropped.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from odmoe_server.importance.cpu_share import split
from odmoe_server.importance.eviction import PolicyName, victims
from odmoe_server.importance.history import History, Key
from odmoe_server.importance.options import ImportanceOptions
from odmoe_server.importance.prefetch import to_fetch
from odmoe_server.importance.substitution import Choice

_LINK = "link"


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a layer outside its experts, of one expert on the device, of one load, of one expert on the host."""

    main_s: float
    expert_s: float
    load_s: float
    host_s: float


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the device does beside loading on demand. `window`: steps over which scores are averaged. `fetches_one`: a
    layer fetches one expert ahead, and only if it lacked one itself, as the SMoE authors' code has it; `only_top`:
    top-score experts only are fetched ahead, as the paper has it."""

    eviction: PolicyName = "lru"
    prefetch: bool = False
    fetches_one: bool = False
    only_top: bool = False
    host: bool = False
    window: int = ImportanceOptions().window


@dataclass(kw_only=True)
class Counts:
    """Of decoding: experts needed (once a layer and step, whatever the batch), those of them in a slot when the gate
    spoke, those computed on the host; loads, forecast ones among them; choices of tokens, and those replaced; the gate
    weight replaced; seconds and steps."""

    needed: int = 0
    hits: int = 0
    on_host: int = 0
    loads: float = 0.0
    prefetches: int = 0
    chosen: int = 0
    replaced: int = 0
    seconds: float = 0.0
    steps: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


class Device:
    """Of `slots` slots, for a model of `num_layers` times `num_experts`."""

    def __init__(self, *, num_layers: int, num_experts: int, slots: int, features: Features, times: Times) -> None:
        self.counts = Counts()
        self._slots, self._features, self._times = slots, features, times
        self._history = History(num_layers=num_layers, num_experts=num_experts, window=features.window)
        self._held: list[set[int]] = [set() for _ in range(num_layers)]
        self._num_held = 0
        self._now_s = self._link_free_s = self._queued_s = 0.0
        self._queue: list[Key] = []
        self._arrives_s: dict[Key, float] = {}
        self._foreseen: dict[Key, int] = {}
        self._in_use: set[Key] = set()
        self._is_prompt = self._lacked = False

    def gate(self, layer: int, mean_E: Sequence[float], *, is_prompt: bool = False) -> Collection[int]:
        """A gate has spoken: the mean scores of its rows. The layer's experts in slots, or on their way to one."""
        self._is_prompt = is_prompt
        if layer == 0 and not is_prompt:
            self.counts.steps += 1
        began_s = self._now_s
        self._now_s += self._times.main_s
        self._work_off()
        self._count(seconds=self._now_s - began_s)
        self._history.scored(layer, [mean_E])
        return self._held[layer]

    def serve(self, layer: int, needed: Mapping[int, float]) -> None:
        """The layer needs these experts, whose best scores are given."""
        began_s, held = self._now_s, self._held[layer]
        keys = {expert: Key(layer, expert) for expert in needed}
        self._in_use = set(keys.values())
        self._break_off()
        here = [keys[expert] for expert in needed if expert in held]
        late = [self._arrives_s[key] for key in here if self._arrives_s.get(key, 0.0) > began_s]
        self._arrives_s.clear()
        missing = {expert: score for expert, score in needed.items() if expert not in held}
        self._lacked = bool(missing)
        load, host = self._split(missing)
        arrivals = sorted([*late, *(self._loaded_s() for _ in load)])
        done_s = began_s + self._times.expert_s * (len(here) - len(late))
        for arrival_s in arrivals:
            done_s = max(done_s, arrival_s) + self._times.expert_s
        self._now_s = max(done_s, began_s + self._times.host_s * len(host))
        self._take([keys[expert] for expert in load], protected=self._in_use)
        self._history.used(layer, needed)
        self._queue, self._foreseen = [], {}
        self._queued_s = began_s
        self._count(
            needed=len(needed),
            hits=len(here) - len(late),
            on_host=len(host),
            loads=len(load),
            seconds=self._now_s - began_s,
        )

    def foresee(self, layer: int, predicted: Sequence[Choice]) -> None:
        """What a cheap look ahead says of the layer that comes next."""
        chosen = {expert for choice in predicted for expert in choice.experts}
        self._foreseen = {Key(layer, expert): 1 for expert in chosen}
        if self._features.prefetch:
            wanted = to_fetch(predicted, at_hand=self._held[layer], only_top=self._features.only_top)
            if self._features.fetches_one:
                wanted = wanted[:1] if self._lacked else []
            self._queue = [Key(layer, expert) for expert in wanted]

    def replaced(self, *, chosen: int, replaced: int) -> None:
        """So many choices of tokens, and how many of them others stood in for."""
        self._count(chosen=chosen, replaced=replaced)

    def _count(self, **grown: float) -> None:
        if not self._is_prompt:
            for name, more in grown.items():
                setattr(self.counts, name, getattr(self.counts, name) + more)

    def _split(self, missing: Mapping[int, float]) -> tuple[Sequence[int], Sequence[int]]:
        if not self._features.host or self._is_prompt:
            return sorted(missing, key=lambda expert: (-missing[expert], expert)), ()
        links = dict.fromkeys(missing, _LINK)
        shared = split(missing, links=links, load_s=self._times.load_s, host_s=self._times.host_s)
        return shared.load, shared.host

    def _work_off(self) -> None:
        """Begin foreseen loads while the link is free before now."""
        begun: dict[Key, float] = {}
        free_s = max(self._link_free_s, self._queued_s)
        for key in self._queue:
            if free_s >= self._now_s:
                break
            free_s = begun[key] = free_s + self._times.load_s
        self._queue = []
        taken = self._take(list(begun), protected=self._in_use.union(self._foreseen))
        for key in taken:
            self._link_free_s = self._arrives_s[key] = begun[key]
        self._count(loads=len(taken), prefetches=len(taken))

    def _break_off(self) -> None:
        """A foreseen load under way that nobody needs gives the link back."""
        for key, arrives_s in self._arrives_s.items():
            if arrives_s > self._now_s and key not in self._in_use:
                self._count(loads=-(arrives_s - self._now_s) / self._times.load_s)
                self._link_free_s = self._now_s
                self._held[key.layer].discard(key.expert)
                self._num_held -= 1

    def _loaded_s(self) -> float:
        self._link_free_s = max(self._link_free_s, self._now_s) + self._times.load_s
        return self._link_free_s

    def _take(self, keys: Sequence[Key], *, protected: Collection[Key]) -> Sequence[Key]:
        """Into slots, as far as there is room that nobody protected holds; those that found some."""
        lacking = self._num_held + len(keys) - self._slots
        if lacking > 0:
            held = (Key(layer, expert) for layer, experts in enumerate(self._held) for expert in experts)
            leaving = victims(
                held,
                policy=self._features.eviction,
                history=self._history,
                foreseen=self._foreseen,
                protected=protected,
            )[:lacking]
            for key in leaving:
                self._held[key.layer].discard(key.expert)
            self._num_held -= len(leaving)
        taken = keys[: self._slots - self._num_held]
        for key in taken:
            self._held[key.layer].add(key.expert)
        self._num_held += len(taken)
        return taken
