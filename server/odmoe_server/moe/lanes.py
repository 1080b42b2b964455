"""Several forwards of one model that go in lock step and meet at every MoE layer. Knows no cluster and no request.

A *lane* is one forward of the stock model: one token of a sequence, or one chunk of a prompt. Each runs in a greenlet
of its own until its next MoE layer asks for experts; then the next lane runs. When all have come there, their experts
are served together. So the lanes share loads, but nothing is multiplied in another shape than it would be alone: a
lane's results are the same bits whoever runs beside it. Lanes of one sequence follow one another in the order of
positions: at each layer the later one finds the earlier one's keys and values in the cache, as if it had come a step
later.

T token rows of a lane, K experts a token, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from odmoe_model.seam import ExpertsCall
from odmoe_server.moe.tally import Tally
from odmoe_server.moe.trace import RoutedCall
from odmoe_wire.messages import Span, Wants


@dataclass(kw_only=True, eq=False)
class Lane:
    """What one forward takes, and what is to be known of it. `next_span`: what the step after this one takes of a
    prompt. `tallies` is empty for a prompt, which has no forecast and would only blur what forecasts are worth. `alpha`
    above 0 allows experts to be substituted. `served`, unless None: what computes the lane's tokens is left here, an
    index_TK for each layer. With `keeps_logits` those behind all its tokens are left in `logits_TV`."""

    sequence: int
    position: int
    ids: Sequence[int]
    cache: Cache
    is_prompt: bool = False
    next_span: Span | None = None
    wants: Wants = "cache"
    tallies: tuple[Tally, ...] = ()
    alpha: float = 0.0
    routed: list[RoutedCall] = field(default_factory=list)
    served: list[torch.Tensor] | None = None
    keeps_logits: bool = False
    logits_TV: torch.Tensor | None = None

    @property
    def span(self) -> Span:
        """The lane's tokens as the wire calls them."""
        return Span(self.sequence, self.position, len(self.ids))


# The experts' weighted sums out_TH, one for each lane, for the calls of one layer in the same order.
Meeting = Callable[[Sequence[Lane], Sequence[ExpertsCall]], list[torch.Tensor]]


def meet(call: ExpertsCall) -> torch.Tensor:
    """Handler of the experts' seam within a lane: waits until all lanes have come to the layer."""
    step = getcurrent().parent
    assert step is not None, "the model runs within run_lanes"
    return cast(torch.Tensor, step.switch(call))


def run_lanes(model: PreTrainedModel, lanes: Sequence[Lane], meeting: Meeting) -> list[torch.Tensor]:
    """logits_V after the last token of each lane, whose caches then hold all tokens. `meet` must be installed in the
    model. Raises what the model or `meeting` raises; the caches are then of no use any more."""
    layers = by_layer(model, lanes, meeting)
    while True:
        try:
            next(layers)
        except StopIteration as done:
            logits: list[torch.Tensor] = done.value
            return logits


@torch.inference_mode()
def by_layer(
    model: PreTrainedModel, lanes: Sequence[Lane], meeting: Meeting
) -> Generator[None, None, list[torch.Tensor]]:
    """`run_lanes`, which stops behind each MoE layer. Meanwhile lanes of other sequences may go through the model.
    To be driven from one thread, and closed if it is given up."""
    runs = [greenlet(_forward) for _ in lanes]
    try:
        came = [run.switch(model, lane) for run, lane in zip(runs, lanes, strict=True)]
        while not runs[0].dead:
            outputs = meeting(lanes, came)
            came = [run.switch(out_TH) for run, out_TH in zip(runs, outputs, strict=True)]
            yield
        assert all(run.dead for run in runs), "all lanes have the same MoE layers"
        return came
    finally:
        for run in runs:
            if not run.dead:
                run.throw(GreenletExit)


def _forward(model: PreTrainedModel, lane: Lane) -> torch.Tensor:
    with _last_row_alone(model) if lane.keeps_logits else nullcontext():
        output = model(
            input_ids=torch.tensor([list(lane.ids)], device=model.device),
            past_key_values=LaneCache(lane.cache, start=lane.position),
            use_cache=True,
            logits_to_keep=0 if lane.keeps_logits else 1,
        )
    if lane.keeps_logits:
        lane.logits_TV = output.logits[0]
    logits_V: torch.Tensor = output.logits[0, -1]
    return logits_V


@contextmanager
def _last_row_alone(model: PreTrainedModel) -> Iterator[None]:
    """Have the head multiply the last row by itself, too, as it is multiplied where only that one is wanted: in another
    shape it would be rounded otherwise, and what follows could depend on whether somebody looks at the prompt."""

    def again(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...], logits_BTV: torch.Tensor) -> None:
        if logits_BTV.shape[1] > 1:  # lanes beside this one keep one row
            logits_BTV[:, -1:] = head.forward(inputs[0][:, -1:])

    hook = model.get_output_embeddings().register_forward_hook(again)
    try:
        yield
    finally:
        hook.remove()


class LaneCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A sequence's cache as one lane sees it: as long as it was when all earlier positions, and no later ones, had
    gone through. The layers are the sequence's own."""

    def __init__(self, cache: Cache, *, start: int) -> None:
        super().__init__(layers=cache.layers)
        self._start = start
        self._grown: dict[int, int] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Cache.update`."""
        self._grown[layer_idx] = key_states.shape[-2]
        grown: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return grown

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """See `Cache.get_seq_length`: before the layer, without this lane's tokens."""
        return self._start + self._grown.get(layer_idx, 0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """See `Cache.get_query_offset`."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """See `Cache.get_mask_sizes`. Asked before the lanes ahead have come to the layer."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, DynamicSlidingWindowLayer):
            return self._start + query_length, 0
        seen = min(self._start, layer.sliding_window - 1)
        return seen + query_length, self._start - seen
