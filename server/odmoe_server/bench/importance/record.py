"""What the record of `odmoe bench importance` says: columns, sentences, facts. Pure."""

from collections.abc import Iterable
from typing import Final

import msgspec

from odmoe_server.bench.importance.arms import GOAL_ALPHA, GOAL_SHARE, IMPORTANCE, LEARNED, LIKE_ALPHAS
from odmoe_server.bench.importance.measure import FINE_NAME, HOST_RATIO, LOAD_RATIO, Findings
from odmoe_server.bench.importance.rows import REPLAYED, Row
from odmoe_server.bench.record import Column, Machine, Record

COLUMNS: Final = (
    Column("model", "model"),
    Column("how", "how"),
    Column("policy", "policy"),
    Column("slots, %", "slots_share", 1, 100),
    Column("batch", "batch", 0),
    Column("alpha", "alpha", 2),
    Column("window", "window", 0, brief=False),
    Column("hit rate, %", "hit_rate", 1, 100),
    Column("replaced, %", "substituted", 1, 100),
    Column("on host, %", "host_share", 1, 100, brief=False),
    Column("MB a token", "bytes_per_token", 1, 1e-6),
    Column("tpot, ms", "tpot_ms", 1),
    Column("to LRU, %", "tpot_vs_lru", 1, 100),
    Column("first token, ms", "ttft_ms", 0, brief=False),
    Column("computed tpot, ms", "tpot_computed_ms", 1, brief=False),
    Column("computed, to LRU, %", "tpot_computed_vs_lru", 1, 100),
    Column("perplexity", "perplexity", 3),
    Column("to alpha 0, %", "perplexity_vs_gated", 2, 100),
    Column("from", "perplexity_low", 2, 100, brief=False),
    Column("to", "perplexity_high", 2, 100, brief=False),
    Column("agreement, %", "agreement", 1, 100),
    Column("answers right", "tasks_right", 0),
)
_GOAL_ALPHAS: Final = (0.25, 0.35)


def record_of(findings: Findings, *, machine: Machine, command: str) -> Record:
    """The whole of it."""
    rows = [msgspec.to_builtins(row) for row in findings.rows]
    return Record(
        name="importance",
        title="Importance mode: hit rate, time and quality beside LRU with the same slots",
        command=command,
        machine=machine,
        columns=[column for column in COLUMNS if any(row.get(column.field) is not None for row in rows)],
        rows=rows,
        facts={
            "load_ratio": LOAD_RATIO,
            "host_ratio": HOST_RATIO,
            "models": {
                name: {"shape": found.shape, "times": found.times, "tokens": found.tokens}
                for name, found in findings.replayed.items()
            },
            "served": findings.served_facts,
        },
        notes=_notes(findings),
    )


def _notes(findings: Findings) -> list[str]:
    rows = findings.rows
    return [
        "policies, each with what is above it: lru; eviction by mean score (eq. 3); substitution; prefetch of the next "
        "layer's predicted experts, its gate being asked about this layer's rows: top-score ones, then those that "
        "could not be replaced; importance: all that and a part of the "
        "missing experts computed on the host (Algorithm 2). lfu, forecast: other evictions. "
        "importance-learned: substitutes picked by learned likeness of outputs instead of by score",
        "prefetch-top: as prefetch, but of top-score experts only, as the paper has it; "
        "short cuts of the SMoE authors' code: code-substitution beside substitution (never the (k+1)-th expert, and "
        "substitutes by index instead of best score first), code-prefetch beside prefetch-top (one expert a layer, and "
        "only where the layer lacked one), code-eviction beside prefetch-top (least recently used), code: all three",
        "hit rate: experts in a slot when the gate asks, over experts needed, each counted once a layer and step; what "
        "the host computes, or what is still on its way, is no hit",
        f"{REPLAYED}: in one process with the server's own rules on one device's slots. Hits, bytes and quality are "
        "exact, but for prefetch and host, which depend on times; times are computed, not measured: from a layer's "
        f"time and an expert's, measured on this machine, with a link on which a layer's experts take {LOAD_RATIO:g} "
        f"times the layer, one after the other, and a host on which an expert takes {HOST_RATIO:g} times a load",
        *(_of_models(findings)),
        *(_goals(rows)),
        *(_price_of_prefetch(rows)),
        *(_likeness(rows)),
        *(str(note) for note in findings.served_facts.get("notes", ())),  # type: ignore[attr-defined]
    ]


def _of_models(findings: Findings) -> list[str]:
    texts = []
    for name, found in findings.replayed.items():
        shape, times = found.shape, found.times
        texts.append(
            f"{name}: {shape['family']}, {shape['layers']} layers of {shape['experts']} experts, top-{shape['top_k']}, "
            f"{shape['expert_bytes'] / 1e6:.2f} MB each; {found.tokens} tokens "
            f"{'drawn by Zipf law' if name == FINE_NAME else 'of held-out text'}; a layer "
            f"{1e3 * times['main_s']:.2f} ms without experts, an expert {1e3 * times['expert_s']:.2f} ms, a load "
            f"{1e3 * times['load_s']:.2f} ms"
        )
    return texts


def _goals(rows: Iterable[Row]) -> list[str]:
    """What came of the figures the paper has at alpha 0.25 to 0.35 with 28.7 % of the experts in slots."""
    wanted = [
        row
        for row in rows
        if row.policy == IMPORTANCE and row.slots_share == GOAL_SHARE and _in(row.alpha, _GOAL_ALPHAS)
    ]
    texts = []
    for model, how, batch in dict.fromkeys((row.model, row.how, row.batch) for row in wanted):
        same = [row for row in wanted if (row.model, row.how, row.batch) == (model, how, batch)]
        text = f"{model}, {how}, batch {batch}, alpha 0.25 to 0.35 with {100 * GOAL_SHARE:g} % in slots: "
        text += f"hit rate {_span(same, 'hit_rate')} % (goal 60)"
        for field, words in (
            ("tpot_vs_lru", "time a token against LRU"),
            ("tpot_computed_vs_lru", "computed time a token against LRU"),
            ("perplexity_vs_gated", "perplexity against alpha 0"),
        ):
            if all(getattr(row, field) is not None for row in same):
                text += f", {words} {_span(same, field)} %"
        texts.append(text)
    return texts


def _price_of_prefetch(rows: Iterable[Row]) -> list[str]:
    """Why the whole may hit less than its parts."""
    rate = {
        (row.model, row.batch, row.policy): 100 * row.hit_rate
        for row in rows
        if _is_beside_learned(row) and row.alpha == GOAL_ALPHA
    }
    return [
        f"{model}, batch {batch}, alpha {GOAL_ALPHA:g}: hit rate {rate[model, batch, 'substitution']:.1f} % without "
        f"prefetch, {rate[model, batch, 'prefetch']:.1f} % with it and {rate[model, batch, 'prefetch-top']:.1f} % with "
        "that of top-score experts only: what is fetched in vain takes a slot, and what is still on its way is no hit"
        for model, batch, policy in rate
        if policy == "substitution"
    ]


def _likeness(rows: Iterable[Row]) -> list[str]:
    found = {(row.model, row.policy, row.batch, row.alpha): row for row in rows if _is_beside_learned(row)}
    texts = []
    for (model, policy, batch, alpha), row in found.items():
        other = found.get((model, IMPORTANCE, batch, alpha))
        if policy != LEARNED or alpha not in LIKE_ALPHAS or row.perplexity is None or other is None:
            continue
        texts.append(
            f"{model}, batch {batch}, alpha {alpha:g}: learned likeness {row.perplexity:.3f} perplexity, "
            f"{100 * _some(row.agreement):.1f} % agreement at a hit rate of {100 * row.hit_rate:.1f} %; near score "
            f"{_some(other.perplexity):.3f}, {100 * _some(other.agreement):.1f} %, {100 * other.hit_rate:.1f} %"
        )
    return texts


def _is_beside_learned(row: Row) -> bool:
    return row.how == REPLAYED and row.slots_share == GOAL_SHARE


def _some(value: float | None) -> float:
    assert value is not None
    return value


def _in(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def _span(rows: Iterable[Row], field: str) -> str:
    values = [100 * _some(getattr(row, field)) for row in rows]
    return f"{min(values):.1f} to {max(values):.1f}"
