"""From what was read and measured to the rows of a record. Pure.

All device bytes are those of weights and caches; activations, a few rows of the hidden size, are left out everywhere.
"""

from dataclasses import dataclass
from statistics import median
from typing import Any

from odmoe_model.manifest import Manifest
from odmoe_server.bench.reading import Reading
from odmoe_server.bench.variants import RESIDENT
from odmoe_wire.checks import ITEMSIZE_BYTES


@dataclass(frozen=True, kw_only=True)
class DeviceBytes:
    """What each role's device holds: the server's weights and cache, the slots of each node, the shadow's weights."""

    server: int
    nodes: tuple[int, ...] = ()
    predictor: int = 0

    @property
    def total(self) -> int:
        return self.server + sum(self.nodes) + self.predictor


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The resident run, which all else is divided by. `device_bytes` are its weights and cache."""

    tokens_per_s: float
    first_s: float
    device_bytes: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one variant did at one speed of its links: for each prompt the decoding of it, without the prompt's own
    part, and the seconds to the first token of each of the first prompts."""

    variant: str
    link_ratio: float
    link_gbps: float
    slots: int
    decoded: list[Reading]
    first_s: list[float]
    identical: bool
    device: DeviceBytes
    runs_ahead: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the record. Shares and ratios are fractions; `tokens_per_s` is the median of `tokens_per_s_runs`,
    one for each prompt. `stall_share` is the part of decoding in which the server waited for loads, by the longest
    wait of each layer; `link_utilisation` the part of it in which a link was loading, over all links. `recall` counts
    forecasts that came after the gate too, `recall_in_time` does not. `loads` are those of decoding, `loads_unused`
    those in vain, the prompt's among them. `agreement` is the share of the shadow's guesses that the model agreed with:
    of those a step verified, or, where steps verify none, of the tokens it went on with by itself."""

    variant: str
    link_ratio: float | None
    link_gbps: float | None = None
    slots: int | None = None
    implementation: str | None = None
    tokens_per_s: float
    tokens_per_s_runs: list[float]
    ratio_to_resident: float
    ttft_s: float
    ttft_ratio: float
    server_bytes: int
    node_bytes: int
    predictor_bytes: int
    device_bytes: int
    device_bytes_ratio: float
    stall_share: float | None = None
    link_utilisation: float | None = None
    recall: float | None = None
    recall_in_time: float | None = None
    agreement: float | None = None
    tokens: int = 0
    loads: int | None = None
    loads_unused: int | None = None
    identical: bool


def row_of(run: Run, reference: Reference) -> Row:
    """The line of one run."""
    speeds = [reading.between_tokens / reading.between_s for reading in run.decoded]
    tokens_per_s, ttft_s = median(speeds), median(run.first_s)
    return Row(
        variant=run.variant,
        link_ratio=run.link_ratio,
        link_gbps=run.link_gbps,
        slots=run.slots,
        tokens_per_s=tokens_per_s,
        tokens_per_s_runs=speeds,
        ratio_to_resident=tokens_per_s / reference.tokens_per_s,
        ttft_s=ttft_s,
        ttft_ratio=ttft_s / reference.first_s,
        server_bytes=run.device.server,
        node_bytes=max(run.device.nodes),
        predictor_bytes=run.device.predictor,
        device_bytes=run.device.total,
        device_bytes_ratio=run.device.total / reference.device_bytes,
        tokens=round(_sum(run, "between_tokens")),
        identical=run.identical,
        **_of_experts(run),
    )


def _of_experts(run: Run) -> dict[str, Any]:
    between_s, activations = _sum(run, "between_s"), _sum(run, "activations")
    return {
        "stall_share": _sum(run, "stall_s") / between_s,
        "link_utilisation": _sum(run, "load_s") / (len(run.device.nodes) * between_s),
        "recall": (_sum(run, "predicted") + _sum(run, "predicted_late")) / activations,
        "recall_in_time": _sum(run, "predicted") / activations,
        "agreement": _agreement(run),
        "loads": round(_sum(run, "loads")),
        "loads_unused": round(_sum(run, "loads_unused")),
    }


def _agreement(run: Run) -> float | None:
    if guesses := _sum(run, "guesses"):
        return _sum(run, "agreed") / guesses
    return max(0.0, 1 - _sum(run, "realigned") / _sum(run, "between_tokens")) if run.runs_ahead else None


def _sum(run: Run, name: str) -> float:
    return float(sum(getattr(reading, name) for reading in run.decoded))


def resident_row(*, implementation: str, speeds: list[float], reference: Reference, tokens: int) -> Row:
    """The line everything is compared with: ones, by definition."""
    return Row(
        variant=RESIDENT,
        link_ratio=None,
        implementation=implementation,
        tokens_per_s=reference.tokens_per_s,
        tokens_per_s_runs=speeds,
        ratio_to_resident=1.0,
        ttft_s=reference.first_s,
        ttft_ratio=1.0,
        server_bytes=reference.device_bytes,
        node_bytes=0,
        predictor_bytes=0,
        device_bytes=reference.device_bytes,
        device_bytes_ratio=1.0,
        tokens=tokens,
        identical=True,
    )


def cache_bytes(manifest: Manifest, *, tokens: int) -> int:
    """Keys and values of so many tokens, for models with plain attention in every layer."""
    config = manifest.config
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    per_token = 2 * config["num_hidden_layers"] * kv_heads * head_size * ITEMSIZE_BYTES[manifest.dtype]
    return int(per_token) * tokens
