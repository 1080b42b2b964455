"""The emulative predictor (OD-MoE section 3.2): a quantised copy of the model whose own routings are the forecast.

Holds one cache for each sequence and is kept in line by what the full model sends. It may go on with its own next
tokens meanwhile; what it did on a wrong one is undone. Knows no sockets, no nodes and no threads; one thread uses it.

Shape suffixes: T token rows, K experts a token, H hidden size.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from odmoe_model import seam
from odmoe_model.kvcache import (
    cache_bytes,
    import_cache,
    new_cache,
    restore_cache,
    snapshot_cache,
    trim_cache,
    truncate_cache,
)
from odmoe_model.quantize import Int8Weight, QuantizationReport, Quantizer
from odmoe_model.routers import RoutersError, routers_of
from odmoe_model.store import ExpertStore
from odmoe_predictor.config import Scope
from odmoe_predictor.experts import Progress, QuantizedExperts
from odmoe_predictor.feedback import Correction, Gate, Sights
from odmoe_predictor.parts import load_parts
from odmoe_predictor.passes import AbandonedError, OnRouting, Pass, SharedPass
from odmoe_predictor.ragged import RaggedCache, companions, is_plain
from odmoe_wire.messages import CacheLayer

log = logging.getLogger(__name__)

# Most rows that go through the model at once: a prompt must not take memory with its length.
MOST_ROWS = 512
# What an alignment asks for: a forecast; nothing, since it was forecast before; nothing, since no token is known.
Aligned = Literal["forecast", "known", "nothing"]


class SequenceError(ValueError):
    """A sequence is not known here, or what came does not follow on what the shadow has of it."""


@dataclass
class _Sequence:
    """`inputs` are tokens whose positions the cache does not hold yet; `newest` how many of them the last
    alignment asked a forecast for. `fed` are the tokens of positions it does hold, from the last aligned one on, and
    `sights` what the gates saw there.
    `hidden_H` is what the head makes the token of position `hidden_for` of: `own_token`, once it has."""

    cache: DynamicCache
    inputs: dict[int, int] = field(default_factory=dict)
    newest: int = 0
    fed: dict[int, int] = field(default_factory=dict)
    sights: Sights = field(default_factory=Sights)
    hidden_H: Tensor | None = None
    hidden_for: int = 0
    own_token: int | None = None

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())

    def fed_to(self, hidden_H: Tensor) -> None:
        """A forward has taken the inputs, as far as the cache goes now, and ends with this."""
        length = self.length
        self.fed |= {at: token for at, token in self.inputs.items() if at < length}
        self.inputs = {at: token for at, token in self.inputs.items() if at >= length}
        self.hidden_H, self.hidden_for, self.own_token = hidden_H, self.length, None

    def forget_cut(self) -> None:
        """Let go of the next token when what it was computed from was cut off."""
        if self.length < self.hidden_for:
            self.hidden_H = self.own_token = None


class Shadow:
    """Use `Shadow.load`. `max_sequences` bounds the caches: the one least recently aligned goes first. `gates` are the
    layers', for `correct`."""

    def __init__(
        self,
        body: nn.Module,
        experts: QuantizedExperts,
        *,
        head: nn.Module,
        config: PreTrainedConfig,
        report: QuantizationReport,
        max_sequences: int,
        gates: Sequence[Gate] = (),
    ) -> None:
        self.report = report
        self._gates = gates
        self._body = body
        self._experts = experts
        self._head = head
        self._config: Any = config
        self._max_sequences = max_sequences
        self._sequences: OrderedDict[int, _Sequence] = OrderedDict()
        self._pass: Pass | SharedPass | None = None
        self._place = next(body.parameters())
        seam.install(body, self._on_experts)

    @classmethod
    def load(
        cls,
        store: ExpertStore,
        *,
        quantize: Quantizer = Int8Weight,
        scope: Scope = "model",
        device: str = "cpu",
        max_sequences: int = 16,
        feedback: bool = False,
        on_progress: Progress | None = None,
    ) -> "Shadow":
        """Quantise the store's model, or of it the routed experts only. Afterwards the store may be closed: nothing
        of its experts is kept. With `feedback` it can `correct` its forecasts, where the family's gates are known."""
        parts = load_parts(store, quantize=quantize, scope=scope, device=device, on_progress=on_progress)
        return cls(
            parts.body,
            parts.experts,
            head=parts.head,
            config=parts.config,
            report=parts.report,
            max_sequences=max_sequences,
            gates=_gates(parts.body, family=store.manifest.model_type) if feedback else (),
        )

    @property
    def corrects(self) -> bool:
        """Whether `correct` may ever have something to say."""
        return bool(self._gates)

    def start(self, sequence: int) -> None:
        """Begin a sequence, or begin it anew."""
        self._sequences.pop(sequence, None)
        while len(self._sequences) >= self._max_sequences:
            self._sequences.popitem(last=False)
        self._sequences[sequence] = _Sequence(new_cache(self._config))

    @torch.inference_mode()
    def align(
        self,
        sequence: int,
        *,
        position: int,
        tokens: Sequence[int],
        layers: Sequence[CacheLayer] = (),
        tensors: Sequence[Tensor] = (),
    ) -> Aligned:
        """Take over the full model's cache, if it came (`kvcache.import_cache`), and remember `tokens`, the inputs
        from `position` on, for `forecast`; without any the shadow's own next token. Without a cache the shadow's own
        positions before `position` stand. Those from there on stand when they were fed with the same tokens.

        Raises SequenceError when the sequence is unknown or a token no token, CacheError when the cache does not
        fit; the sequence is then as it was."""
        state = self._known(sequence)
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._config.get_text_config().vocab_size:
            raise SequenceError(f"sequence {sequence}: a token is not in the vocabulary")
        if layers and layers[0].length > position:
            raise SequenceError(f"sequence {sequence}: a cache of {layers[0].length} positions for {position}")
        self._sequences.move_to_end(sequence)
        known = _is_fed(state, position, tokens)
        ahead = state.length - position if known else 0
        if layers:
            here = [tensor.to(device=self._place.device, dtype=self._place.dtype) for tensor in tensors]
            keep = ahead if layers[0].length == position else 0
            import_cache(state.cache, layers, here, keep=keep)
            known = known and state.length == position + ahead
            trim_cache(state.cache)
        elif not known and position < state.length:
            truncate_cache(state.cache, length=position)
        state.fed = {at: token for at, token in state.fed.items() if position <= at < state.length}
        state.sights.keep(position, state.length)
        state.forget_cut()
        state.inputs = {at: token for at, token in state.inputs.items() if at < position}
        state.newest = 0
        if known:
            return "known"
        inputs = list(tokens) or self._own_next(state, position)
        state.inputs |= {position + i: token for i, token in enumerate(inputs)}
        state.newest = len(inputs)
        return "forecast" if inputs else "nothing"

    def go_on(self, sequence: int) -> Aligned:
        """Remember the shadow's own next token for `forecast`, ahead of every alignment. Raises SequenceError."""
        state = self._known(sequence)
        position = state.length
        inputs = self._own_next(state, position)
        state.inputs = {position + i: token for i, token in enumerate(inputs)}
        state.newest = len(inputs)
        return "forecast" if inputs else "nothing"

    @torch.inference_mode()
    def forecast(self, sequence: int, *, on_routing: OnRouting, is_stale: Callable[[], bool] = lambda: False) -> bool:
        """Feed the remembered inputs and report, layer by layer, the experts the newest of them go to.

        `is_stale` is asked at each MoE layer; once it says yes the forward is given up, the cache put back, and
        False returned. Raises SequenceError when inputs are missing between the cache's end and the newest."""
        state = self._known(sequence)
        inputs = self._inputs(sequence)
        if not inputs or not state.newest:
            return True
        return self._feed(state, inputs, on_routing=on_routing, is_stale=is_stale)

    def has_long(self, sequence: int) -> bool:
        """Whether more inputs are remembered than go through the model at once: `feed_some` is for others' sake."""
        return len(self._sequences[sequence].inputs) > MOST_ROWS if sequence in self._sequences else False

    @torch.inference_mode()
    def feed_some(self, sequence: int, *, is_stale: Callable[[], bool]) -> bool:
        """Feed the first of the remembered inputs, as many as go through the model at once, of which nothing is
        reported; else as `forecast`."""
        state, inputs = self._known(sequence), self._inputs(sequence)[:MOST_ROWS]
        return self._feed(state, inputs, on_routing=lambda layer, experts: None, is_stale=is_stale)

    def _inputs(self, sequence: int) -> list[int]:
        """What is to be fed, from the cache's end to the newest. Raises SequenceError."""
        state = self._known(sequence)
        first = state.length
        inputs = [state.inputs.get(at) for at in range(first, max(state.inputs, default=first - 1) + 1)]
        known = [token for token in inputs if token is not None]
        if len(known) < len(inputs):
            raise SequenceError(f"sequence {sequence}: no input and no cache for position {first + inputs.index(None)}")
        return known

    def _feed(
        self, state: _Sequence, inputs: Sequence[int], *, on_routing: OnRouting, is_stale: Callable[[], bool]
    ) -> bool:
        first, saved = state.length, snapshot_cache(state.cache)
        self._pass = under_way = self._new_pass(state, inputs, on_routing=on_routing, is_stale=is_stale)
        done = False
        try:
            for begin in range(0, len(inputs), MOST_ROWS):
                ids = torch.tensor([inputs[begin : begin + MOST_ROWS]], device=self._place.device)
                under_way.later -= ids.shape[1]
                output = self._body(input_ids=ids, past_key_values=state.cache, use_cache=True)
            done = True
        except AbandonedError:
            return False
        finally:
            self._pass = None
            if not done:
                restore_cache(state.cache, saved)
                state.sights.keep(0, first)
        state.fed_to(output.last_hidden_state[0, -1])
        trim_cache(state.cache)
        return True

    def together(self, sequences: Sequence[int]) -> list[int]:
        """The first of the sequences, if there is one, and those that `forecast_together` can take with it."""
        states = [(sequence, self._sequences.get(sequence)) for sequence in sequences]
        fit = [(sequence, state.length) for sequence, state in states if state is not None and _is_one_token(state)]
        if not fit or fit[0][0] != sequences[0]:
            return list(sequences[:1])
        return [fit[place][0] for place in companions([length for _, length in fit])]

    @torch.inference_mode()
    def forecast_together(
        self,
        sequences: Sequence[int],
        *,
        on_routing: Callable[[int, int, list[int]], None],
        is_stale: Callable[[int], bool],
        go_on: bool = False,
    ) -> list[int]:
        """What `forecast` does for each of the sequences, in one forward; the sequence is what both callbacks hear
        first. Sequences that turn stale are left as they were; the others are returned. With `go_on` their own next
        tokens are made at once, too."""
        states = [self._known(sequence) for sequence in sequences]
        ragged = RaggedCache([state.cache for state in states])
        inputs_B = torch.tensor([[state.inputs[state.length]] for state in states], device=self._place.device)
        self._pass = shared = SharedPass(
            {
                row: self._new_pass(
                    state, [0], on_routing=partial(on_routing, sequence), is_stale=partial(is_stale, sequence)
                )
                for row, (sequence, state) in enumerate(zip(sequences, states, strict=True))
            }
        )
        done: set[int] = set()
        try:
            output = self._body(
                input_ids=inputs_B,
                attention_mask=ragged.seen().to(self._place.device),
                position_ids=ragged.positions().to(self._place.device),
                past_key_values=ragged,
                use_cache=True,
            )
            done = set(shared.passes)
        except AbandonedError:
            return []
        finally:
            self._pass = None
            for row, state in enumerate(states):
                if row not in done:
                    state.sights.keep(0, state.length)
        hidden_BH = output.last_hidden_state[:, -1]
        for row in done:
            ragged.give_back(row)
            states[row].fed_to(hidden_BH[row])
        if go_on:
            for row, token in enumerate(self._head(hidden_BH).argmax(dim=-1).tolist()):
                states[row].own_token = token if row in done else states[row].own_token
        return [sequences[row] for row in sorted(done)]

    @torch.inference_mode()
    def correct(self, sequence: int, *, position: int, layer: int, x_1H: Tensor, target: int) -> Correction | None:
        """What the row `x_1H` that the full model's gate of a layer saw makes of the forecast of layer `target`; None
        when the shadow has not forecast both layers for the position, or the position is past. May be called from
        within `is_stale` and `on_routing`."""
        state = self._sequences.get(sequence)
        if state is None or not self._gates:
            return None
        return state.sights.correct(position, layer=layer, x_1H=x_1H, target=target, gates=self._gates)

    def end(self, sequence: int) -> None:
        """The sequence is over; one that is not known is over already."""
        self._sequences.pop(sequence, None)

    def forget(self) -> None:
        """All sequences are over."""
        self._sequences.clear()

    def length(self, sequence: int) -> int:
        """Positions the shadow's cache of the sequence holds. Raises SequenceError."""
        return self._known(sequence).length

    def lengths(self) -> dict[int, int]:
        """Positions the caches of all sequences hold."""
        return {sequence: state.length for sequence, state in self._sequences.items()}

    def shares(self, sequence: int) -> bool:
        """Whether its cache can go beside others in one forward."""
        return is_plain(self._known(sequence).cache)

    def token_at(self, sequence: int, position: int) -> int | None:
        """The input the shadow took, or is to take, at a position from the last aligned one on."""
        state = self._known(sequence)
        return state.inputs.get(position, state.fed.get(position))

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def caches_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache_bytes(state.cache) for state in self._sequences.values())

    @torch.inference_mode()
    def _own_next(self, state: _Sequence, position: int) -> list[int]:
        """The shadow's own greedy token for the position after its cache; none when it did not compute that."""
        if state.hidden_H is None or not state.hidden_for == position == state.length:
            return []
        if state.own_token is None:
            state.own_token = int(self._head(state.hidden_H).argmax())
        return [state.own_token]

    def _known(self, sequence: int) -> _Sequence:
        state = self._sequences.get(sequence)
        if state is None:
            raise SequenceError(f"sequence {sequence} is not known")
        return state

    def _new_pass(
        self, state: _Sequence, inputs: Sequence[int], *, on_routing: OnRouting, is_stale: Callable[[], bool]
    ) -> Pass:
        return Pass(
            position=state.length + len(inputs) - 1,
            newest=state.newest,
            later=len(inputs),
            on_routing=on_routing,
            is_stale=is_stale,
            sights=state.sights if self._gates else None,
        )

    def _on_experts(self, call: seam.ExpertsCall) -> Tensor:
        """A layer's router has spoken."""
        assert self._pass is not None, "experts are only asked for inside forecast"
        self._pass.hear(call)
        return self._experts(call)


def _gates(body: nn.Module, *, family: str) -> Sequence[Gate]:
    try:
        return routers_of(body, family=family)
    except RoutersError as error:
        log.info("forecasts are not corrected: %s", error)
        return ()


def _is_one_token(state: _Sequence) -> bool:
    """Whether all there is to feed is one token behind a cache that can go beside others."""
    return list(state.inputs) == [state.length] and state.newest == 1 and state.length > 0 and is_plain(state.cache)


def _is_fed(state: _Sequence, position: int, tokens: Sequence[int]) -> bool:
    """Whether the cache holds the position and the tokens that are the inputs from there on."""
    if position + max(1, len(tokens)) > state.length:
        return False
    return all(state.fed.get(position + i) == token for i, token in enumerate(tokens))
