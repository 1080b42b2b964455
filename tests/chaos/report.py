"""A campaign's record, and which promises it found broken. Knows figures only."""

from typing import Any, Final

from chaos.campaign import Plan
from chaos.ledger import Ledger
from odmoe_server.bench.record import Column, Record, this_machine

MOST_RECOVERY_S: Final = 2.0
MOST_GROWTH: Final = 1.05  # of the server's memory, from the second quarter of its longest life to the last
LONG_SILENCE_S: Final = 1.0  # kept in the record with what went on
_COLUMNS: Final = (
    Column("role", "role"),
    Column("fault", "kind"),
    Column("faults", "faults", 0),
    Column("held, s", "hold_s", 2),
    Column("recovery p50, s", "recovery_s_p50", 2),
    Column("recovery, longest, s", "recovery_s_most", 2),
)


def record_of(ledger: Ledger, *, plan: Plan, took_s: float, encrypted: Ledger | None = None) -> Record:
    """For tests/bench/results; `encrypted` is of a further campaign, under CURVE."""
    return Record(
        name="chaos",
        title=f"Chaos: {len(ledger.happened)} faults under load",
        command=f"make chaos ARGS='--faults {plan.faults} --seed {plan.seed} --nodes {plan.nodes} "
        f"--clients {plan.clients}'",
        machine=this_machine(),
        columns=_COLUMNS,
        rows=ledger.rows(),
        facts={
            "summary": {**ledger.summary(), **under_curve(encrypted)},
            "seed": plan.seed,
            "nodes": plan.nodes,
            "clients": plan.clients,
            "took_s": round(took_s, 1),
            "silences": ledger.silences(longer_than_s=LONG_SILENCE_S),
        },
        notes=[*_notes(ledger, plan=plan, took_s=took_s), *_notes_of_curve(encrypted)],
    )


def under_curve(encrypted: Ledger | None) -> dict[str, Any]:
    """Its figures by the same names, apart."""
    return {} if encrypted is None else {"under_curve": encrypted.summary()}


def _notes_of_curve(encrypted: Ledger | None) -> list[str]:
    if encrypted is None:
        return ["No part of the campaign ran under CURVE."]
    found = encrypted.summary()
    return [
        f"A further {found['faults']} faults befell a cluster with CURVE on every link, none of which changed frames "
        f"(drop and duplicate): {found['requests']} requests, {found['wrong_answers']} wrong, "
        f"{found['failed_requests']} failed while the server was there, {found['ended_with_the_server']} ended with "
        f"it; recovery p50 {found['recovery_s_p50']} s, p99 {found['recovery_s_p99']} s. The figures above are of "
        "links in plain text.",
    ]


def _notes(ledger: Ledger, *, plan: Plan, took_s: float) -> list[str]:
    found = ledger.summary()
    return [
        f"One server, one predictor, {plan.nodes} nodes as processes of their own, links over TCP through proxies that "
        f"lose, repeat, delay and hold back messages; {plan.clients} clients that stream without a pause, "
        f"{took_s:.0f} s in all. A tiny random model: each answer was compared with transformers' own.",
        f"{found['requests']} requests: {found['right_answers']} answered and right, {found['wrong_answers']} wrong, "
        f"{found['failed_requests']} failed while the server was there, {found['ended_with_the_server']} ended with "
        f"the server itself; besides, {found['refused_and_tried_again']} were refused with 503 or found nobody "
        "listening, and were sent again.",
        "Recovery is the longest time without a token on any stream, of the silences that touch a fault; for the "
        "server's own process from the moment it runs again. Faults of nodes overlap, with two nodes at least that "
        "nothing has befallen, and then share a silence.",
        f"Recovery of faults of nodes, predictor and their links: p50 {found['recovery_s_p50']} s, p99 "
        f"{found['recovery_s_p99']} s; of the server's: p50 {found['server_recovery_s_p50']} s, p99 "
        f"{found['server_recovery_s_p99']} s.",
        f"The longest silence that no fault touched was {found['longest_silence_without_fault_s']} s: so much the "
        "machine itself may add.",
        f"Memory of the server in its longest life: {found.get('server_mb_early')} MB in its second quarter, "
        f"{found.get('server_mb_late')} MB in its last.",
    ]


def promises_broken(ledger: Ledger) -> list[str]:
    """In words; none when all held."""
    found = ledger.summary()
    broken = [f"wrong answer: {asked.detail}" for asked in ledger.asked if asked.outcome == "wrong"]
    broken += [f"failed request: {asked.detail}" for asked in ledger.failed()]
    if (found["recovery_s_p99"] or 0.0) > MOST_RECOVERY_S:
        broken.append(f"recovery p99 of {found['recovery_s_p99']} s, at most {MOST_RECOVERY_S} s")
    if found.get("server_mb_late", 0.0) > MOST_GROWTH * found.get("server_mb_early", 0.0):
        broken.append(f"the server grew from {found['server_mb_early']} to {found['server_mb_late']} MB")
    return broken
