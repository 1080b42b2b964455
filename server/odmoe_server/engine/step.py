"""One step of the decode loop: the fresh tokens of each sequence through the model, and the shadow kept in line.

Knows the stock transformers model, the experts' handler and the predictor's messages; knows no queue and no client.
A step takes q >= 1 fresh tokens of each of b >= 1 sequences; the sequences' forwards follow one another.

V vocabulary.
"""

from collections.abc import Sequence as Batch

import torch
from transformers import PreTrainedModel

from odmoe_model.kvcache import export_cache
from odmoe_model.tensors import to_blob
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.engine.align import Periods
from odmoe_server.engine.sequence import Sequence
from odmoe_server.moe.remote import RemoteExperts, Tally
from odmoe_wire.messages import Align, Span, Start, Wants


class Stepper:
    """Runs steps; one per server, used by one thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        experts: RemoteExperts,
        cluster: ClusterDriver,
        total: Tally,
        periods: Periods,
    ) -> None:
        self._periods = periods
        self._model = model
        self._experts = experts
        self._cluster = cluster
        self._total = total

    def step(self, batch: Batch[Sequence]) -> list[torch.Tensor]:
        """logits_V after the last fresh token of each sequence, whose caches then hold all fresh tokens.

        Raises CallError when the cluster cannot serve a layer.
        """
        wants: list[Wants] = []
        for sequence in batch:
            if sequence.is_prompt and sequence.position == 0:
                self._cluster.begin_prompt(_span(sequence))
            wants.append(self._align(sequence))
        return [self._forward(sequence, wants=more) for sequence, more in zip(batch, wants, strict=True)]

    @torch.inference_mode()
    def _forward(self, sequence: Sequence, *, wants: Wants) -> torch.Tensor:
        span = _span(sequence)
        self._experts.wants = wants
        self._experts.spans = (span,)
        self._experts.is_prompt = sequence.is_prompt
        self._experts.next_spans = _next_chunk(sequence, span)
        # A prompt has no forecast, so it would only blur what the forecasts are worth.
        self._experts.tallies = () if sequence.is_prompt else (sequence.decode_tally, self._total)
        output = self._model(
            input_ids=torch.tensor([sequence.fresh_ids], device=self._model.device),
            past_key_values=sequence.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        sequence.advance()
        logits_V: torch.Tensor = output.logits[0, -1]
        return logits_V

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


def _span(sequence: Sequence) -> Span:
    """What the next step takes."""
    return Span(sequence.sequence_id, sequence.position, len(sequence.fresh_ids))


def _next_chunk(sequence: Sequence, span: Span) -> tuple[Span, ...]:
    """What the step after the one of `span` takes of the prompt."""
    position = span.position + span.length
    length = len(sequence.chunk_at(position))
    return (Span(span.sequence, position, length),) if length else ()


def _fresh_for_shadow(sequence: Sequence) -> list[int]:
    """The shadow hears of a prompt once, so it gets all of it."""
    return list(sequence.request.prompt_ids if sequence.is_prompt else sequence.fresh_ids)
