"""What the timing model says of each row of a record of `odmoe bench decode`, from measured parts alone.

The parts are: what a layer, an expert and the shadow's layer take; a layer and a first token whose loads take nothing,
which tell what messages take; the ratio of a load to a layer; recall; how many experts a cache had to load. No measured
speed of a row goes in. That machine has one core for the server and all nodes, and one for the predictor; loads take
none.
"""

from dataclasses import dataclass, replace
from typing import Final

from odmoe_server.planner import prefill
from odmoe_server.planner.bench_record import BenchRecord, RecordedRow, WithoutLoads
from odmoe_server.planner.drafts import decode
from odmoe_server.planner.forecasts import Forecast
from odmoe_server.planner.machines import Crew, Node, Times
from odmoe_server.planner.rig import Rig

TOLERANCE: Final = 0.20
RESIDENT: Final = "resident"
# Draws differ from run to run, so several are taken together.
_SEEDS: Final = range(4)

FORECASTS: Final = {
    "on-demand": Forecast(run_ahead=1),
    "drafts": Forecast(run_ahead=8, draft=3),
    "on-demand-feedback": Forecast(run_ahead=1),
    "on-demand-late": Forecast(),
    "token-only": Forecast(align_kv=0),
    "kv-only": Forecast(align_token=0),
    "no-alignment": Forecast(align_token=0, align_kv=0),
    "random-prefetch": Forecast(source="random"),
    "no-predictor": Forecast(source="none"),
    "lru": Forecast(source="slots"),
}
"""How each variant forecasts; recall is the record's."""
# The variants that are also measured without loads: one for all that have a predictor, one for all others.
WITH_SHADOW: Final = "on-demand"
WITHOUT: Final = "no-predictor"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row's measured figures beside the predicted ones; `note` says why there are none."""

    variant: str
    link_ratio: float | None
    tokens_per_s: float
    first_s: float | None
    predicted_tokens_per_s: float | None = None
    predicted_first_s: float | None = None
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Of the speed of decoding, as a fraction of what was measured."""
        return _difference(self.predicted_tokens_per_s, self.tokens_per_s)

    @property
    def first_difference(self) -> float | None:
        """The same of the time to the first token."""
        return _difference(self.predicted_first_s, self.first_s)

    @property
    def off(self) -> bool:
        return self.difference is not None and abs(self.difference) > TOLERANCE


def compare(record: BenchRecord) -> list[Compared]:
    """Every row of the record, in its order. Raises ValueError if none can be predicted."""
    compared = [_compare(record, row) for row in record.rows]
    if all(row.difference is None for row in compared):
        raise ValueError(f"none of the record's rows can be predicted: {compared[0].note}")
    return compared


def assumptions(record: BenchRecord) -> list[str]:
    """What was given and what had to be taken for granted, as lines."""
    lines = [
        "given: what a layer and an expert take; what both and a first token take where loads take next to nothing; "
        "the ratio of a load to a layer; recall; the loads of lru. No speed of a row above is.",
    ]
    if missing := sorted({WITH_SHADOW, WITHOUT} - set(record.without_loads)):
        lines.append(f"no {' and no '.join(missing)} without loads in the record: messages are taken to take nothing.")
    if record.shadow_layer_s is None:
        lines.append("the record does not say what a layer of the shadow takes: taken as nothing.")
    if all(row.agreement is None for row in record.rows):
        lines.append("the record does not say how often a shadow that runs ahead is right: taken as always.")
    return lines


def _compare(record: BenchRecord, row: RecordedRow) -> Compared:
    measured = Compared(
        variant=row.variant, link_ratio=row.link_ratio, tokens_per_s=row.tokens_per_s, first_s=row.ttft_s
    )
    if row.variant == RESIDENT:
        layers_s = record.shape.moe_layers * (record.main_s + record.shape.top_k * record.expert_s)
        return replace(measured, predicted_tokens_per_s=1 / layers_s)
    try:
        forecast = forecast_of(record, row)
    except ValueError as error:
        return replace(measured, note=str(error))
    return replace(
        measured,
        predicted_tokens_per_s=tokens_per_s(record, row, forecast),
        predicted_first_s=first_token_s(record, row, forecast),
    )


def forecast_of(record: BenchRecord, row: RecordedRow) -> Forecast:
    """How a row's experts are forecast. Raises ValueError where the model or the record does not say."""
    forecast = FORECASTS.get(row.variant)
    if forecast is None:
        raise ValueError("the model does not know this variant")
    if row.link_ratio is None:
        raise ValueError("the row has no link_ratio")
    if forecast.source == "shadow":
        if row.recall is None:
            raise ValueError("the row has no recall")
        agreement = 1.0 if row.agreement is None else row.agreement
        return replace(forecast, recall=(row.recall,), agreement=agreement)
    if forecast.source == "slots":
        if row.loads is None or row.tokens is None:
            raise ValueError("the row does not say how many loads there were")
        needed = row.tokens * record.shape.moe_layers * record.shape.top_k
        return replace(forecast, recall=(max(0.0, 1 - row.loads / needed),))
    return forecast


def tokens_per_s(record: BenchRecord, row: RecordedRow, forecast: Forecast) -> float:
    """The speed of decoding after the first token."""
    crew, times = crew_of(record, row, forecast), times_of(record, row, forecast)
    runs = [
        decode(
            crew,
            times,
            forecast,
            layers=record.shape.moe_layers,
            num_experts=record.shape.experts,
            top_k=record.shape.top_k,
            tokens=record.question.tokens - 1,
            seed=seed,
        )
        for seed in _SEEDS
    ]
    return sum(len(run.ends_s) for run in runs) / sum(run.ends_s[-1] for run in runs)


def first_token_s(record: BenchRecord, row: RecordedRow, forecast: Forecast) -> float | None:
    """The time to the first token: what it takes without loads, with all experts of each layer loaded. What of a layer
    is no expert's is taken to be the same share of it as in decoding. None where it was not measured without loads."""
    given = without_loads(record, forecast)
    if given is None:
        return None
    shape = record.shape
    layer_s = given.first_s / shape.moe_layers
    main_share = record.main_s / (record.main_s + shape.top_k * record.expert_s)
    crew, times = crew_of(record, row, forecast), times_of(record, row, forecast)
    expert_s = (1 - main_share) * layer_s / shape.experts
    prompt = replace(times, main_s=main_share * layer_s, expert_s=expert_s, row_s=0.0)
    rig = Rig(crew, times.load_s)
    prefill.pass_through(rig, prompt, crew, layers=shape.moe_layers, active=shape.experts)
    return rig.clock_s


def without_loads(record: BenchRecord, forecast: Forecast) -> WithoutLoads | None:
    """What was measured without loads that holds for this kind of forecast."""
    return record.without_loads.get(WITH_SHADOW if forecast.source in ("shadow", "random") else WITHOUT)


def message_s(record: BenchRecord, forecast: Forecast) -> float:
    """What one message takes of the shared core: a layer without loads is its computing, and two messages for each node
    that is called."""
    given, shape = without_loads(record, forecast), record.shape
    if given is None:
        return 0.0
    rest_s = given.layer_s - record.main_s - shape.top_k * record.expert_s
    return max(0.0, rest_s / (2 * min(shape.top_k, record.question.group_size)))


def crew_of(record: BenchRecord, row: RecordedRow, forecast: Forecast) -> Crew:
    """The machine of the record: all but the predictor on one core. With guesses, as many nodes serve a layer as a step
    may need experts of it."""
    node, shape, group_size = Node(slots=row.slots or 1, link_gb_per_s=1.0), record.shape, record.question.group_size
    if forecast.draft:
        group_size = min(shape.experts, shape.top_k * (1 + forecast.draft))
    return Crew(nodes=(node,) * record.question.nodes, group_size=group_size, shared_core=True)


def times_of(record: BenchRecord, row: RecordedRow, forecast: Forecast) -> Times:
    """What each step of a row takes."""
    return Times(
        main_s=record.main_s,
        expert_s=record.expert_s,
        shadow_s=record.shadow_layer_s or 0.0,
        load_s=((row.link_ratio or 0.0) * record.layer_s,) * record.question.nodes,
        row_s=message_s(record, forecast),
        kv_s=0.0,
        latency_s=0.0,
        first_stage=record.first_stage,
    )


def _difference(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else predicted / measured - 1
