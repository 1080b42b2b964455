"""One step of the decode loop: the fresh tokens of each sequence through the model, and the shadow kept in line.

Knows the stock transformers model, lanes, and the predictor's messages; knows no queue and no client. A step takes
either chunks of prompts, or of each sequence the newest token and behind it tokens the shadow has guessed (drafts),
which it verifies. Every one of these is a lane (see `moe.lanes`), so all share the experts that are loaded; where the
model lets them, they share one forward too (`moe.rows`).

V vocabulary.
"""

from collections.abc import Callable, Generator
from collections.abc import Sequence as Batch

import torch
from transformers import PreTrainedModel

from odmoe_model.kvcache import export_cache
from odmoe_model.tensors import to_blob
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.engine.align import Periods
from odmoe_server.engine.sequence import Sequence
from odmoe_server.moe.lanes import Lane, Meeting, by_layer, run_lanes
from odmoe_server.moe.rows import Rows
from odmoe_server.moe.tally import Tally
from odmoe_server.moe.trace import RoutedCall
from odmoe_wire.messages import Align, Span, Start, Wants


class Stepper:
    """Runs steps; one per server, used by one thread. `meeting` serves a layer's experts; `total` counts for all.
    `rows`: how single tokens share a forward, if the model lets them."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        meeting: Meeting,
        cluster: ClusterDriver,
        total: Tally,
        periods: Periods,
        trace: Callable[[RoutedCall], None] | None = None,
        rows: Rows | None = None,
    ) -> None:
        self._model = model
        self._rows = rows
        self._meeting = meeting
        self._cluster = cluster
        self._total = total
        self._periods = periods
        self._trace = trace

    def step(self, batch: Batch[Sequence]) -> list[list[torch.Tensor]]:
        """For each sequence the logits_V behind its last fresh token and behind each of its drafts. All of them are in
        the caches then; `Sequence.take` keeps what was right.

        The batch is all prompts or none. Raises CallError when the cluster cannot serve a layer.
        """
        began_s = self._now_s()
        lanes = self._begin(batch)
        together = [lane for own in lanes for lane in own]
        rows = iter(self._run(together))
        self._tell_stepped(began_s, together)
        return [[next(rows) for _ in own] for own in lanes]

    def step_by_layer(self, batch: Batch[Sequence]) -> Generator[None, None, list[list[torch.Tensor]]]:
        """`step`, which stops behind each MoE layer. Steps with other sequences may come in between."""
        began_s = self._now_s()
        lanes = self._begin(batch)
        together = [lane for own in lanes for lane in own]
        rows = iter((yield from by_layer(self._model, together, self._meeting)))
        self._tell_stepped(began_s, together)
        return [[next(rows) for _ in own] for own in lanes]

    def _begin(self, batch: Batch[Sequence]) -> list[list[Lane]]:
        """Of each sequence, what the step runs."""
        if begin := tuple(_span(sequence) for sequence in batch if sequence.is_new):
            self._cluster.begin_prompt(begin)
        return [_lanes(sequence, wants=self._align(sequence)) for sequence in batch]

    def _now_s(self) -> float:
        """By the timeline's clock, if there is one."""
        timeline = self._cluster.timeline
        return 0.0 if timeline is None else timeline.clock()

    def _tell_stepped(self, began_s: float, lanes: Batch[Lane]) -> None:
        timeline = self._cluster.timeline
        if timeline is not None:
            timeline.stepped(began_s, spans=(lane.span for lane in lanes), is_prompt=lanes[0].is_prompt)

    def _run(self, lanes: Batch[Lane]) -> list[torch.Tensor]:
        if self._rows is not None and self._rows.fits(lanes):
            return self._rows.run(lanes, self._meeting)
        return run_lanes(self._model, lanes, self._meeting)

    def take(self, sequence: Sequence, rows: Batch[torch.Tensor]) -> None:
        """Let a sequence take what a step brought it, and count and trace what that was."""
        num_drafts, lanes = len(sequence.draft_ids), sequence.lanes
        kept = sequence.take(rows)
        for tally in (sequence.decode_tally, self._total):
            tally.drafted += num_drafts
            tally.accepted += kept - 1
        if (timeline := self._cluster.timeline) is not None and not lanes[0].is_prompt:
            timeline.taken(num_tokens=kept, num_guesses=num_drafts)
        if self._trace is not None:
            for lane in lanes[:kept]:
                for routed in lane.routed:
                    self._trace(routed)

    def draft(self, sequence: Sequence, *, most: int) -> None:
        """Take up to so many of the shadow's guesses for what follows the newest token, as far as they are known."""
        most = min(most, sequence.draft_room)
        if most <= 0:
            return
        said = self._cluster.drafts(sequence.sequence_id, sequence.position + 1, most, behind=sequence.fresh_ids[0])
        sequence.draft_ids = list(said)

    def _align(self, sequence: Sequence) -> Wants:
        """Send the predictor what `align` decides is due for the step; what it wants while the step runs."""
        snapshot = self._cluster.snapshot
        due = sequence.shadowed.align(
            predictor=snapshot.predictor_incarnation,
            wants=snapshot.predictor_wants,
            position=sequence.position,
            num_fresh=len(sequence.fresh_ids),
            num_prompt=len(sequence.request.prompt_ids),
            periods=self._periods,
        )
        if due is None:
            return "cache"
        if due.start:
            self._cluster.post(Start(sequence=sequence.sequence_id))
        layers, tensors = export_cache(sequence.cache, rows=due.rows) if due.rows else ([], [])
        align = Align(
            sequence=sequence.sequence_id,
            position=sequence.position,
            tokens=_fresh_for_shadow(sequence) if due.token else [],
            cache=layers,
        )
        self._cluster.post(align, blobs=[to_blob(tensor) for tensor in tensors])
        return due.wants


def _lanes(sequence: Sequence, *, wants: Wants) -> list[Lane]:
    """What the step runs of a sequence."""
    if sequence.is_prompt:
        span = _span(sequence)
        sequence.lanes = [
            Lane(
                sequence=sequence.sequence_id,
                position=sequence.position,
                ids=sequence.fresh_ids,
                cache=sequence.cache,
                is_prompt=True,
                next_span=_next_chunk(sequence, span),
                wants=wants,
            )
        ]
        return _watched(sequence)
    sequence.lanes = [
        Lane(
            sequence=sequence.sequence_id,
            position=position,
            ids=[token_id],
            cache=sequence.cache,
            wants=wants,
            tallies=(sequence.decode_tally,),
            alpha=sequence.alpha,
        )
        for position, token_id in enumerate([*sequence.fresh_ids, *sequence.draft_ids], sequence.position)
    ]
    return _watched(sequence)


def _watched(sequence: Sequence) -> list[Lane]:
    """The lanes of a step, which keep what is to be told of them."""
    if sequence.reader is not None:
        for lane in sequence.lanes:
            sequence.reader.watch(lane)
    return sequence.lanes


def _span(sequence: Sequence) -> Span:
    """The fresh tokens of the next step."""
    return Span(sequence.sequence_id, sequence.position, len(sequence.fresh_ids))


def _next_chunk(sequence: Sequence, span: Span) -> Span | None:
    """What the step after the one of `span` takes of the prompt."""
    position = span.position + span.length
    length = len(sequence.chunk_at(position))
    return Span(span.sequence, position, length) if length else None


def _fresh_for_shadow(sequence: Sequence) -> list[int]:
    """The shadow hears of a prompt once, so it gets all of it."""
    return list(sequence.request.prompt_ids if sequence.is_prompt else sequence.fresh_ids)
