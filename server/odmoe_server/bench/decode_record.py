"""What a decode run's record says: columns, sentences, and figures for the planner. Pure."""

from dataclasses import asdict
from statistics import median
from typing import Any, Final

from odmoe_model.experts import ExpertMaths
from odmoe_server.bench.decode import Findings
from odmoe_server.bench.record import Column, Machine, Record
from odmoe_server.bench.resident import Measured
from odmoe_server.bench.rows import Run

COLUMNS: Final = (
    Column("variant", "variant"),
    Column("link ratio", "link_ratio", 1),
    Column("tokens/s", "tokens_per_s", 2),
    Column("of resident", "ratio_to_resident", 3),
    Column("first token, of resident", "ttft_ratio", 2),
    Column("server MB", "server_bytes", 0, 1e-6, brief=False),
    Column("each node MB", "node_bytes", 0, 1e-6, brief=False),
    Column("predictor MB", "predictor_bytes", 0, 1e-6, brief=False),
    Column("all MB", "device_bytes", 0, 1e-6),
    Column("of resident", "device_bytes_ratio", 3),
    Column("stalled, %", "stall_share", 1, 100),
    Column("links in use, %", "link_utilisation", 1, 100),
    Column("recall, %", "recall", 2, 100),
    Column("in time, %", "recall_in_time", 2, 100),
    Column("guesses right, %", "agreement", 1, 100, brief=False),
    Column("loads", "loads", 0, brief=False),
    Column("unused", "loads_unused", 0, brief=False),
    Column("identical", "identical"),
)


def record_of(findings: Findings, *, machine: Machine, command: str) -> Record:
    """The whole of it."""
    return Record(
        name="decode",
        title="Decoding on demand, beside plain transformers with everything in memory",
        command=command,
        machine=machine,
        columns=COLUMNS,
        rows=[asdict(row) for row in findings.rows],
        facts=_facts(findings),
        notes=_notes(findings),
    )


def _facts(findings: Findings) -> dict[str, Any]:
    manifest, question = findings.manifest, findings.question
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "pinning": findings.cores.words,
        "device": "emulated",
        "shape": {
            "family": manifest.model_type,
            "dtype": manifest.dtype,
            **{name: manifest.config.get(name) for name in (*names, "vocab_size")},
            "moe_layers": manifest.num_moe_layers,
            "experts": manifest.num_experts,
            "top_k": manifest.top_k,
            "expert_bytes": manifest.record_bytes,
            "weight_bytes": findings.before.weight_bytes,
        },
        "question": {
            name: getattr(question, name)
            for name in ("nodes", "group_size", "tokens", "prompt_tokens", "first_prompt_tokens", "repeats")
        },
        "layer_s": findings.layer_s,
        "main_s": findings.before.main_s,
        "expert_s": findings.before.expert_s,
        # Emulated devices compute this share of an expert while the rest is on the link.
        "first_stage": ExpertMaths(manifest).up_bytes / manifest.record_bytes,
        "shadow_layer_s": findings.shadow_layer_s,
        "without_loads": {
            run.variant: _without_loads(run, layers=manifest.num_moe_layers) for run in findings.without_loads
        },
        "load_s": {f"{ratio:g}": ratio * findings.layer_s for ratio in question.link_ratios},
        "drift": findings.drift,
        "resident": {
            "before": [_resident(measured, findings) for measured in findings.before.measured],
            "after": [_resident(measured, findings) for measured in findings.after.measured],
        },
    }


def _without_loads(run: Run, *, layers: int) -> dict[str, float]:
    """What a layer of decoding and a first token take where loads take next to nothing."""
    token_s = median(reading.between_s / reading.between_tokens for reading in run.decoded)
    return {"layer_s": token_s / layers, "first_s": median(run.first_s)}


def _resident(measured: Measured, findings: Findings) -> dict[str, Any]:
    if not measured.answers:
        return {"implementation": measured.implementation, "reason": measured.reason}
    return {
        "implementation": measured.implementation,
        "tokens_per_s": measured.tokens_per_s,
        "ttft_s": measured.first_s,
        "reason": measured.reason,
        "answers_as_eager": [answer.tokens for answer in measured.answers] == findings.expected,
    }


def _bounds(findings: Findings) -> list[str]:
    """What speed is left where loads take next to nothing: messages and processes alone hold it down there."""
    resident = findings.reference.tokens_per_s
    return [
        f"bound: {run.variant} with loads that take next to nothing comes at "
        f"{median(r.between_tokens / r.between_s for r in run.decoded) / resident:.3f} of resident"
        for run in findings.without_loads
    ]


def _notes(findings: Findings) -> list[str]:
    manifest, question = findings.manifest, findings.question
    spread = max(max(row.tokens_per_s_runs) / min(row.tokens_per_s_runs) - 1 for row in findings.rows)
    return [
        *_bounds(findings),
        f"{findings.cores.words}; {question.nodes} nodes in groups of {question.group_size}, on emulated devices of "
        "one slot each (the LRU cache: as many as fit into the bytes of slots and shadow together)",
        f"{manifest.model_type}, {manifest.dtype}, {manifest.num_moe_layers} layers of {manifest.num_experts} experts, "
        f"top-{manifest.top_k}; an expert has {manifest.record_bytes / 1e6:.1f} MB, all weights "
        f"{findings.before.weight_bytes / 1e9:.2f} GB",
        f"link ratio: how many times as long as a layer's computation ({1e3 * findings.layer_s:.2f} ms) a load takes",
        f"{question.repeats} prompts of {question.prompt_tokens} tokens, {question.tokens} tokens decoded after each; "
        f"first tokens are those of prompts of {question.first_prompt_tokens} tokens; medians",
        f"resident: transformers' {findings.fastest} experts, the fastest of its own; identical: the answers are those "
        "of its eager experts, character for character",
        f"speed of the resident run at the end against that at the beginning: {100 * findings.drift:+.1f} %; the "
        f"fastest prompt of any line was at most {100 * spread:.0f} % faster than its slowest",
    ]
