"""The OD-MoE paper's testbed and its printed figures, and what the model says of each. Knows nothing of odmoe's own.

The paper (arXiv 2512.03927) gives a ten-node testbed: one main node with an RTX 3090, a shadow node with two, eight
workers with one each and PCIe 4.0, on 1 Gbit/s Ethernet, with Mixtral-8x7B in fp32 and an INT8 shadow.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import exp
from typing import Final, Literal

from odmoe_server.planner import memory, prefill, shape
from odmoe_server.planner.forecasts import Forecast
from odmoe_server.planner.machines import Device, Machines, Network, Node, times
from odmoe_server.planner.simulate import Decoded, decode

TOLERANCE: Final = 0.10
MODEL: Final = shape.named("mixtral-8x7b", weight_bits=32)
# The data sheet of the RTX 3090; the overhead is the fitted one (see `testbed`).
RTX_3090: Final = Device(memory_gb_per_s=936, tflops=35.6, overhead_s=0.0)
UNFITTED: Final = Machines(
    nodes=(Node(slots=1, link_gb_per_s=25),) * 8,
    group_size=2,
    device=RTX_3090,
    network=Network(latency_s=0.1e-3, gbit_per_s=1),
    shadow_bits=8,
)
ASSUMPTIONS: Final = (
    "assumed: PCIe 4.0 x16 moves 25 GB/s; a message takes 0.1 ms besides its bytes; a wrong load on its way is broken "
    "off, which the paper does not say.",
    "from data sheets: 936 GB/s of device memory, 35.6 TFLOPS; 1 Gbit/s Ethernet; the weights are fp32.",
    "from the paper: recall of 97.34 % if aligned at every step; if never, it falls from 100 % to 30 % at token 256 "
    "with a mean of 45 %, here exponentially.",
    "chosen because the printed times of first tokens show it: a prompt's loads wait for its routing, and the main "
    "node's Ethernet carries one message at a time, in or out.",
    "simplified: the two experts of a layer are forecast independently of each other; draws are seeded.",
    "fitted, once: the overhead of each step, from the row marked so; every other row is predicted with it.",
)
NOT_COMPARED: Final = (
    "not compared: the other systems' columns of Table 2, which ran on another machine; and the rows without a "
    "prediction, because their recall is not in the paper's text."
)
LOAD_AFTER_ROUTING: Final = 1.032
OUTPUT_TOKENS: Final = 256
# Runs are long enough for the mean over wrong forecasts to settle.
_LONG_RUN_TOKENS: Final = 1024
ALIGNED: Final = Forecast(recall=(0.9734,))
NONE: Final = Forecast(source="none")

Status = Literal["predicted", "fitted", "recall unknown"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: the paper's, ours, and what ours is. `note` says what a row without a prediction shows instead."""

    table: str
    what: str
    unit: str
    paper: float
    ours: float | None
    status: Status = "predicted"
    note: str = ""

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else self.ours / self.paper - 1

    @property
    def off(self) -> bool:
        return self.difference is not None and abs(self.difference) > TOLERANCE


def testbed() -> Machines:
    """The paper's machines, with the overhead of a step that makes load-after-routing as fast as printed.

    There a layer takes two steps (main and worker), the load and the messages, one after the other, so the overhead
    is half of what is missing."""
    without_s = 1 / _decode(UNFITTED, NONE, tokens=1).tokens_per_s
    overhead_s = (1 / LOAD_AFTER_ROUTING - without_s) / (2 * MODEL.layers)
    return replace(UNFITTED, device=replace(RTX_3090, overhead_s=overhead_s))


def compare() -> list[Row]:
    """Every figure of the testbed in Table 2 and the ablation."""
    machines = testbed()
    return [*_table_2(machines), *_ablation(machines)]


def _decode(machines: Machines, forecast: Forecast, *, tokens: int) -> Decoded:
    return decode(
        machines,
        times(MODEL, machines),
        forecast,
        layers=MODEL.layers,
        num_experts=MODEL.num_experts,
        top_k=MODEL.top_k,
        tokens=tokens,
    )


def _table_2(machines: Machines) -> Iterator[Row]:
    first_s = {tokens: prefill.prefill_s(MODEL, machines, prompt_tokens=tokens, overlap=False) for tokens in (16, 128)}
    printed_ms = {(16, 64): 1349.78, (16, 256): 1340.89, (128, 64): 3150.87, (128, 256): 3135.85}
    for (prompt, output), paper in printed_ms.items():
        yield Row(table="Table 2", what=f"first token, {prompt} in, {output} out", unit="ms", paper=paper,
                  ours=1e3 * first_s[prompt])  # fmt: skip
    speed = _decode(machines, ALIGNED, tokens=_LONG_RUN_TOKENS).tokens_per_s
    printed = {(16, 64): 3.67, (16, 256): 3.65, (128, 64): 3.74, (128, 256): 3.71}
    for (prompt, output), paper in printed.items():
        yield Row(table="Table 2", what=f"decoding, {prompt} in, {output} out", unit="tokens/s", paper=paper,
                  ours=speed)  # fmt: skip
    yield Row(table="Table 2", what="decoding, mean", unit="tokens/s", paper=3.6925, ours=speed)
    whole = [output / (first_s[prompt] + (output - 1) / speed) for prompt, output in printed]
    yield Row(
        table="Table 2", what="prompt and answer, mean", unit="tokens/s", paper=3.37, ours=sum(whole) / len(whole)
    )
    needed = memory.of(MODEL, machines, context_tokens=128 + OUTPUT_TOKENS)
    yield Row(table="Table 2", what="device memory, all roles", unit="GB", paper=60, ours=needed.total_bytes / 1e9)


def _ablation(machines: Machines) -> Iterator[Row]:
    unaligned = Forecast(recall=drifting_recall(), align_token=0, align_kv=0)
    token_only = Forecast(align_kv=0)
    kv_only = Forecast(align_token=0)

    def row(what: str, paper: float, forecast: Forecast, status: Status = "predicted") -> Row:
        ours = _decode(machines, forecast, tokens=OUTPUT_TOKENS).tokens_per_s
        return Row(table="ablation", what=what, unit="tokens/s", paper=paper, ours=ours, status=status)

    yield row("token and KV every step", 3.616, ALIGNED)
    yield _implied(machines, "token only", 3.453, token_only)
    yield _implied(machines, "KV only", 2.445, kv_only)
    yield row("neither", 1.185, unaligned)
    yield row("random prefetch", 1.046, Forecast(source="random"))
    yield row("load after routing", LOAD_AFTER_ROUTING, NONE, "fitted")


def _implied(machines: Machines, what: str, paper: float, forecast: Forecast) -> Row:
    """A row whose recall only a picture in the paper shows: the recall that its speed would mean."""
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        tried = _decode(machines, replace(forecast, recall=(middle,)), tokens=OUTPUT_TOKENS).tokens_per_s
        low, high = (middle, high) if tried < paper else (low, middle)
    note = f"recall unknown; {100 * (low + high) / 2:.0f} % would fit"
    return Row(table="ablation", what=what, unit="tokens/s", paper=paper, ours=None, status="recall unknown", note=note)


def drifting_recall() -> tuple[float, ...]:
    """Recall without alignment, token by token: from 1 exponentially towards 0.30, with a mean of 0.45."""
    low, high = 1.0, float(OUTPUT_TOKENS)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean(_falling(middle)) < 0.45 else (low, middle)
    return _falling(low)


def _falling(lifetime: float) -> tuple[float, ...]:
    return tuple(0.30 + 0.70 * exp(-token / lifetime) for token in range(OUTPUT_TOKENS))


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
