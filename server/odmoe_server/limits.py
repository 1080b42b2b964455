"""How much one client may ask for. Plain numbers; who enforces them says what happens."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """`max_choices` are the answers of one request: n for each prompt. `max_wait_s` is the longest a request may take
    to its first token, its time in the queue included; `max_answer_s` from there to its last. `substitutes`: experts
    may be replaced for a request."""

    max_body_bytes: int = 8 * 2**20
    max_messages: int = 4096
    max_choices: int = 64
    max_stops: int = 16
    max_schema_bytes: int = 64 * 2**10
    max_queued: int = 64
    max_wait_s: float = 600.0
    max_answer_s: float = 3600.0
    substitutes: bool = False
