"""The measurement from questions to file: record, shadows, rivals. Knows the order and what to let go of in between."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from odmoe_model.routers import load_routers
from odmoe_model.skeleton import load_generation_config, load_tokenizer
from odmoe_model.store import ExpertStore
from odmoe_predictor.config import Precision, Scope
from odmoe_predictor.parts import load_parts
from odmoe_predictor.process import QUANTIZERS
from odmoe_predictor.recall.contest import contest, training_tokens
from odmoe_predictor.recall.lockstep import full_model, shadow_model
from odmoe_predictor.recall.meter import Meter
from odmoe_predictor.recall.plan import Predictor, RivalRun, ShadowRun, batches, rival_runs, shadow_runs
from odmoe_predictor.recall.questions import HELD_OUT, TRAINING
from odmoe_predictor.recall.record import Record, record_answers
from odmoe_predictor.recall.replay import replay
from odmoe_predictor.recall.results import Results, Row, shadow_curve, shadow_row
from odmoe_predictor.rivals.base import Rival, Shape
from odmoe_predictor.rivals.examples import Tokens
from odmoe_predictor.rivals.fitting import fit
from odmoe_predictor.rivals.frequency import FrequencyRival
from odmoe_predictor.rivals.gate import GateRival
from odmoe_predictor.rivals.previous import PreviousRival
from odmoe_predictor.rivals.random import RandomRival
from odmoe_predictor.rivals.trained import ExpertScores, TrainedRival

# Of the answers the trained rival learns from; long enough for what comes later in an answer to be there.
TRAINING_TOKENS = 128
TRAINING_WIDTH = 128
TRAINING_EPOCHS = 10
QUICK_TRAINING_QUESTIONS = 16


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to measure: `prompts` answers of at most `tokens` tokens."""

    store: Path
    file: Path
    prompts: int
    tokens: int
    quick: bool
    threads: int
    seed: int
    predictors: Sequence[Predictor]
    precisions: Sequence[Precision]
    scopes: Sequence[Scope]


class Measurement:
    """Use `run`. Raises StoreError, OSError, ValueError."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._store = ExpertStore.open(wanted.store, verify=False)
        manifest = self._store.manifest
        self._shape = Shape.of(manifest)
        self.results = Results(
            path=wanted.file,
            model=f"{manifest.model_type}, {self._shape.num_layers} MoE layers of {self._shape.num_experts} experts, "
            f"top {self._shape.top_k}, store {manifest.digest[:16]}",
            prompts=wanted.prompts,
            tokens_per_prompt=wanted.tokens,
            threads=wanted.threads,
            quick=wanted.quick,
            seed=wanted.seed,
        )
        self._rivals = rival_runs(quick=wanted.quick, predictors=wanted.predictors, num_layers=self._shape.num_layers)
        shadows = shadow_runs(quick=wanted.quick, precisions=wanted.precisions, scopes=wanted.scopes)
        self._shadows = list(shadows) if "shadow" in wanted.predictors else []
        self._questions = HELD_OUT[: wanted.prompts]
        self._training = TRAINING[:QUICK_TRAINING_QUESTIONS] if wanted.quick else TRAINING

    @property
    def weights(self) -> list[float]:
        """Of the meter's phases, about in seconds."""
        wanted = self._wanted
        weights = [_seconds(wanted.prompts, steps=wanted.tokens)]
        for run in self._shadows:
            weights += [_seconds(wanted.prompts * len(batch), steps=wanted.tokens) for batch in batches(run)]
        if self._needs_training:
            weights.append(_seconds(len(self._training), steps=min(TRAINING_TOKENS, wanted.tokens)))
        return weights + [2e-3 * wanted.prompts * wanted.tokens] * len(self._rivals)

    @property
    def _needs_training(self) -> bool:
        return any(run.predictor == "trained" for run in self._rivals)

    def run(self, meter: Meter) -> None:
        """Measure everything and write the file after each row."""
        record = self._record(self._questions, self._wanted.tokens, meter, "answers of the full model")
        for shadow in self._shadows:
            self._shadow(shadow, record, meter)
            gc.collect()  # a shadow and its model hold one another, and the next one needs the room
        examples = None
        if self._needs_training:
            examples = training_tokens(
                self._record(self._training, min(TRAINING_TOKENS, self._wanted.tokens), meter, "answers to learn from")
            )
        for run in self._rivals:
            self._rival(run, record, examples, meter)
        self.results.write()

    def _record(self, questions: Sequence[str], tokens: int, meter: Meter, title: str) -> Record:
        prompts = self._encoded(questions, tokens)
        units = len(prompts) + tokens
        record = record_answers(
            full_model(self._store),
            prompts,
            tokens=tokens,
            stops=self._stops(),
            with_inputs=any(run.predictor == "gate" for run in self._rivals),
            on_done=meter.phase(title, units=units),
        )
        gc.collect()
        if not record.steps:
            raise ValueError("the model had nothing to say to these questions")
        return record

    def _encoded(self, questions: Sequence[str], tokens: int) -> list[list[int]]:
        tokenizer = load_tokenizer(self._store)
        chats = [[{"role": "user", "content": question}] for question in questions]
        prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
        room = int(self._store.manifest.config.get("max_position_embeddings", 1 << 20)) - max(map(len, prompts))
        if tokens > room:
            raise ValueError(f"--tokens {tokens}: there is room for {room} in the model's context")
        return prompts

    def _stops(self) -> set[int]:
        stops: Any = load_generation_config(self._store).eos_token_id
        return set() if stops is None else {stops} if isinstance(stops, int) else set(stops)

    def _rival(self, run: RivalRun, record: Record, examples: Tokens | None, meter: Meter) -> None:
        ahead = "" if run.layers_ahead is None else f", {run.layers_ahead} layers ahead"
        on_done = meter.phase(f"{run.predictor}{ahead}", units=len(record.prompts))
        found = contest(self._made(run, examples), record, on_done=on_done)
        self.results.rows.append(
            Row(
                predictor=run.predictor,
                layers_ahead=run.layers_ahead,
                recall=found.tally.recall,
                covered=found.covered,
                tokens=sum(found.tally.alive_N),
                bytes=found.bytes,
            )
        )
        self.results.write()

    def _made(self, run: RivalRun, examples: Tokens | None) -> Rival:
        if run.predictor == "random":
            return RandomRival(self._shape, seed=self._wanted.seed)
        if run.predictor == "frequency":
            return FrequencyRival(self._shape)
        if run.predictor == "previous":
            return PreviousRival()
        assert run.layers_ahead is not None, run
        if run.predictor == "gate":
            return GateRival(load_routers(self._store), look_ahead=run.layers_ahead)
        assert examples is not None, run
        torch.manual_seed(self._wanted.seed)
        scores = ExpertScores(self._shape, look_ahead=run.layers_ahead, width=TRAINING_WIDTH)
        fit(scores, examples, epochs=TRAINING_EPOCHS)
        return TrainedRival(scores)

    def _shadow(self, run: ShadowRun, record: Record, meter: Meter) -> None:
        parts = load_parts(self._store, quantize=QUANTIZERS[run.precision], scope=run.scope)
        model = shadow_model(parts)
        for alignments in batches(run):
            on_done = meter.phase(f"{run.precision} shadow, {run.scope}", units=len(record.steps))
            replayed = replay(model, record, alignments, on_done=on_done)
            ms_per_step = 1e3 * replayed.seconds / (len(record.steps) * len(alignments))
            for alignment, tally in zip(alignments, replayed.tallies, strict=True):
                held_bytes = parts.report.held_bytes
                self.results.rows.append(
                    shadow_row(run, alignment, tally, held_bytes=held_bytes, ms_per_step=ms_per_step)
                )
                self.results.curves.append(shadow_curve(run, alignment, tally))
            self.results.write()


def _seconds(sequences: int, *, steps: int) -> float:
    """About what so many steps of a batch take."""
    return steps * (0.3 + 0.003 * sequences)
