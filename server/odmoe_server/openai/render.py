"""What all answers of the OpenAI dialect have in common: letterhead, usage, reports, events. Knows JSON shapes only.

Does not wait, read clocks or know sockets. Answers are plain dicts, since a stream writes thousands a second;
`answers` has their schemas, which tests hold them to.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from odmoe_server.engine_api import ExpertStats
from odmoe_server.generation import Ending
from odmoe_server.openai.errors import problem_of
from odmoe_server.openai.generating import Generating

DONE = b"data: [DONE]\n\n"
# JSON may hold these as they are, but clients that cut a stream into lines by Unicode's rules would cut here.
LINE_BREAKS = {char.encode(): f"\\u{ord(char):04x}".encode() for char in "\x85\u2028\u2029"}


@dataclass(frozen=True, kw_only=True)
class Letterhead:
    """What every chunk and body of one answer repeats. `created` is unix time in seconds."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        """The beginning of an object of this kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What else a client wants to hear. `num_each` answers belong to each prompt, `prompt_tokens` are all prompts'."""

    prompt_tokens: int
    num_each: int = 1
    usage: bool = False
    usage_always: bool = False
    metrics: bool = False
    expert_stats: bool = False

    @classmethod
    def asked(cls, asked: Generating, *, prompt_tokens: int) -> "Extras":
        """As a request has it."""
        return cls(
            prompt_tokens=prompt_tokens,
            num_each=asked.n or 1,
            usage=asked.wants_usage,
            usage_always=asked.wants_usage_always,
            metrics=bool(asked.return_metrics),
            expert_stats=bool(asked.return_expert_stats),
        )

    def reports(self, endings: Sequence[Ending]) -> dict[str, Any]:
        """The objects that come only where they were asked for."""
        found: dict[str, Any] = {}
        if self.metrics:
            found["metrics"] = metrics(endings)
        if self.expert_stats:
            found["expert_stats"] = expert_stats(endings)
        return found

    def closing(self, head: Mapping[str, Any], endings: Sequence[Ending]) -> Iterator[bytes]:
        """The last events of a stream whose chunks begin with `head`."""
        last = self.reports(endings)
        if self.usage:
            last["usage"] = self.total_usage(endings)
        if last:
            yield event({**head, "choices": [], **last})
        yield DONE

    def total_usage(self, endings: Sequence[Ending]) -> dict[str, Any]:
        """Token counts of the whole answer; the answers to one prompt share it."""
        counts = usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(ending.completion_tokens for ending in endings),
            cached_tokens=sum(ending.cached_tokens for ending in endings[:: self.num_each]),
        )
        return {**counts, **substitutions(endings)}


def usage(*, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """Token counts; no reasoning is hidden."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def substitutions(endings: Sequence[Ending]) -> dict[str, Any]:
    """Answers that were served with experts in others' place say so; the others have no such object."""
    count = sum(ending.substituted.count for ending in endings)
    out_of = sum(ending.substituted.out_of for ending in endings)
    return {"expert_substitutions": {"count": count, "share": count / out_of}} if count else {}


def metrics(endings: Sequence[Ending]) -> dict[str, Any]:
    """How long the answers took, which ran side by side."""
    times = [ending.times for ending in endings]
    answer_s = max(time.answer_s for time in times)
    gaps = sum(max(time.num_tokens - 1, 0) for time in times)
    queued = [ending.queue_s for ending in endings if ending.queue_s is not None]
    return {
        "time_to_first_token_ms": 1000 * min(time.first_token_s for time in times),
        "generation_time_ms": 1000 * answer_s,
        "queue_time_ms": 1000 * min(queued) if queued else None,
        "mean_itl_ms": 1000 * sum(time.answer_s for time in times) / gaps if gaps else None,
        "tokens_per_second": gaps / answer_s if gaps and answer_s else None,
    }


def expert_stats(endings: Sequence[Ending]) -> dict[str, Any] | None:
    """All answers' together; null if stop strings ended them all, so that the engine was not asked."""
    known = [ending.expert_stats for ending in endings if ending.expert_stats is not None]
    if not known:
        return None
    counts = ("activations", "predicted", "hit", "late", "missed", "substituted", "drafted", "accepted")
    return {
        **{name: sum(getattr(stats, name) for stats in known) for name in counts},
        "bytes_loaded": sum(stats.loaded_bytes for stats in known),
        "wait_ms": 1000 * _sum_s(known, "wait_s"),
        "stall_ms": 1000 * _sum_s(known, "stall_s"),
    }


def _sum_s(known: Sequence[ExpertStats], name: str) -> float:
    return float(sum(getattr(stats, name) for stats in known))


def finish(ending: Ending) -> dict[str, Any]:
    """Why an answer ended, as a choice has it."""
    why: dict[str, Any] = {"finish_reason": ending.reason}
    return why if ending.stopped_by is None else {**why, "stop_reason": ending.stopped_by}


def to_json(body: dict[str, Any]) -> bytes:
    """A whole answer."""
    return msgspec.json.encode(body)


def event(chunk: dict[str, Any]) -> bytes:
    """One event of a stream."""
    line = msgspec.json.encode(chunk)
    for char, escaped in LINE_BREAKS.items():
        line = line.replace(char, escaped)
    return b"data: " + line + b"\n\n"


def error_event(error: Exception) -> bytes:
    """What a stream ends with when it breaks off."""
    return b"data: " + json.dumps(problem_of(error).body).encode() + b"\n\n"
