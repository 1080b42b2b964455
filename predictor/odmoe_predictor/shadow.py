"""The emulative predictor (OD-MoE section 3.2): a quantised copy of the model whose own routings are the forecast.

Holds one cache for each sequence and is kept in line by what the full model sends. Knows no sockets, no nodes and
no threads; one thread uses it. Skips the output head: who does not run ahead needs no logits.

Shape suffixes: T token rows, K experts a token.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from odmoe_model.quantize import Int8Weight, QuantizationReport, Quantizer, Treated, quantize_linears
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore
from odmoe_predictor.experts import Progress, QuantizedExperts
from odmoe_wire.messages import CacheLayer

# Called with a layer's ordinal and the experts forecast for it, ascending, as soon as its router has spoken.
OnRouting = Callable[[int, list[int]], None]


class SequenceError(ValueError):
    """A sequence is not known here, or what came does not follow on what the shadow has of it."""


class _Abandoned(Exception):
    """Unwinds a forward that nobody waits for any more."""


@dataclass
class _Sequence:
    """`inputs` are tokens whose positions the cache does not hold yet; `newest` how many of them the last
    alignment asked a forecast for."""

    cache: DynamicCache
    inputs: dict[int, int] = field(default_factory=dict)
    newest: int = 0


@dataclass(frozen=True)
class _Pass:
    """The forward under way: how many rows at the end are forecast, and where to."""

    newest: int
    on_routing: OnRouting
    is_stale: Callable[[], bool]


class Shadow:
    """Use `Shadow.load`. `max_sequences` bounds the caches: the one least recently aligned goes first."""

    def __init__(
        self,
        body: nn.Module,
        experts: QuantizedExperts,
        *,
        config: PreTrainedConfig,
        report: QuantizationReport,
        max_sequences: int,
    ) -> None:
        self.report = report
        self._body = body
        self._experts = experts
        self._config: Any = config
        self._max_sequences = max_sequences
        self._sequences: OrderedDict[int, _Sequence] = OrderedDict()
        self._pass: _Pass | None = None
        self._place = next(body.parameters())
        seam.install(body, self._on_experts)

    @classmethod
    def load(
        cls,
        store: ExpertStore,
        *,
        quantize: Quantizer = Int8Weight,
        device: str = "cpu",
        max_sequences: int = 16,
        on_progress: Progress | None = None,
    ) -> "Shadow":
        """Quantise the store's model. Afterwards the store may be closed: nothing of its experts is kept."""
        model = load_skeleton(store, device=device)
        body = model.base_model
        experts = QuantizedExperts(store, body, quantize=quantize, device=torch.device(device), on_progress=on_progress)
        treated = [*experts.treated, *quantize_linears(body, quantize), *_dropped_head(model, body)]
        report = QuantizationReport(tuple(treated))
        return cls(body, experts, config=model.config, report=report, max_sequences=max_sequences)

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
    ) -> None:
        """Take over the full model's cache, if it came (`kvcache.import_cache`), and remember `tokens`, the inputs
        from `position` on, for `forecast`. Without a cache the shadow's own positions before `position` stand.

        Raises SequenceError when the sequence is unknown or a token no token, CacheError when the cache does not
        fit; the sequence is then as it was."""
        state = self._known(sequence)
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._config.get_text_config().vocab_size:
            raise SequenceError(f"sequence {sequence}: a token is not in the vocabulary")
        if layers and layers[0].length > position:
            raise SequenceError(f"sequence {sequence}: a cache of {layers[0].length} positions for {position}")
        if layers:
            here = [tensor.to(device=self._place.device, dtype=self._place.dtype) for tensor in tensors]
            import_cache(state.cache, layers, here)
            trim_cache(state.cache)
        elif position < state.cache.get_seq_length():
            truncate_cache(state.cache, length=position)
        kept = {at: token for at, token in state.inputs.items() if at < position}
        state.inputs = kept | {position + i: token for i, token in enumerate(tokens)}
        state.newest = len(tokens)
        self._sequences.move_to_end(sequence)

    @torch.inference_mode()
    def forecast(self, sequence: int, *, on_routing: OnRouting, is_stale: Callable[[], bool] = lambda: False) -> bool:
        """Feed the remembered inputs and report, layer by layer, the experts the newest of them go to.

        `is_stale` is asked at each MoE layer; once it says yes the forward is given up, the cache put back, and
        False returned. Raises SequenceError when inputs are missing between the cache's end and the newest."""
        state = self._known(sequence)
        first = state.cache.get_seq_length()
        inputs = [state.inputs.get(at) for at in range(first, max(state.inputs, default=first - 1) + 1)]
        if not inputs or not state.newest:
            return True
        if None in inputs:
            raise SequenceError(f"sequence {sequence}: no input and no cache for position {first + inputs.index(None)}")
        saved = snapshot_cache(state.cache)
        self._pass = _Pass(state.newest, on_routing, is_stale)
        done = False
        try:
            ids = torch.tensor([inputs], device=self._place.device)
            self._body(input_ids=ids, past_key_values=state.cache, use_cache=True)
            done = True
        except _Abandoned:
            return False
        finally:
            self._pass = None
            if not done:
                restore_cache(state.cache, saved)
        state.inputs.clear()
        trim_cache(state.cache)
        return True

    def rollback(self, sequence: int, *, position: int) -> None:
        """Forget everything of the sequence from `position` on. Raises SequenceError or CacheError."""
        state = self._known(sequence)
        if position < state.cache.get_seq_length():
            truncate_cache(state.cache, length=position)
        state.inputs = {at: token for at, token in state.inputs.items() if at < position}

    def end(self, sequence: int) -> None:
        """The sequence is over; one that is not known is over already."""
        self._sequences.pop(sequence, None)

    def forget(self) -> None:
        """All sequences are over."""
        self._sequences.clear()

    def length(self, sequence: int) -> int:
        """Positions the shadow's cache of the sequence holds. Raises SequenceError."""
        return int(self._known(sequence).cache.get_seq_length())

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def caches_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache_bytes(state.cache) for state in self._sequences.values())

    def _known(self, sequence: int) -> _Sequence:
        state = self._sequences.get(sequence)
        if state is None:
            raise SequenceError(f"sequence {sequence} is not known")
        return state

    def _on_experts(self, call: seam.ExpertsCall) -> Tensor:
        """A layer's router has spoken."""
        now = self._pass
        assert now is not None, "experts are only asked for inside forecast"
        if now.is_stale():
            raise _Abandoned
        newest_TK = call.index_TK[-now.newest :]
        now.on_routing(call.layer, sorted(set(newest_TK.flatten().tolist())))
        return self._experts(call)


def _dropped_head(model: Any, body: nn.Module) -> list[Treated]:
    """The output head's entry: `load` lets go of it."""
    held = {id(parameter) for parameter in body.parameters()}
    own = [tensor for tensor in model.get_output_embeddings().parameters() if id(tensor) not in held]
    if not own:
        return []
    return [
        Treated(
            what="output head",
            treatment="dropped",
            reason="a forecast needs no logits",
            weights=sum(tensor.numel() for tensor in own),
            stored_bytes=sum(tensor.nbytes for tensor in own),
            held_bytes=0,
        )
    ]
