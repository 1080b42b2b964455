"""Broken messages at codec and sockets, the figures, and the record of them; `make fuzz` runs it."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from chaos import roles
from fuzz import codec, sockets
from odmoe_server.bench.record import Column, Record, results_directory, this_machine
from support.serve_process import chat_store

MILLION: Final = 1_000_000
_COLUMNS: Final = (
    Column("where", "where"),
    Column("role", "role"),
    Column("messages", "messages", 0),
    Column("counted as protocol errors", "refused", 0),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; what a role could not bear is raised."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=MILLION, help="for the codecs")
    parser.add_argument("--sockets", type=int, default=5000, help="messages for each role's socket")
    parser.add_argument("--seed", type=int, default=20_260_101)
    parser.add_argument("--budget-s", type=float, default=300.0, help="for the codecs")
    parser.add_argument("--out", type=Path, help="folder of the record; by default tests/bench/results")
    options = parser.parse_args(argv)
    console = Console()
    outcome = codec.run(count=options.messages, seed=options.seed, budget_s=options.budget_s)
    console.print(f"codec: {outcome.total} messages in {outcome.took_s:.1f} s, {outcome.refused} refused")
    roles.begin()
    with tempfile.TemporaryDirectory(prefix="odmoe-fuzz-") as scratch:
        store = chat_store(Path(scratch))
        done = sockets.run(count=options.sockets, seed=options.seed, store=store, home=Path(scratch))
    record = _record(outcome, done, command="make fuzz")
    console.print(record.table())
    folder = options.out or results_directory()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record.stem}.json").write_text(record.json(), encoding="utf-8")
    (folder / f"{record.stem}.md").write_text(record.markdown(picture=None), encoding="utf-8")
    return 0


def _record(outcome: codec.Outcome, done: sockets.Sockets, *, command: str) -> Record:
    rows: list[dict[str, Any]] = [{"where": "codec", "role": r, "messages": n} for r, n in outcome.tried.items()]
    rows += [{"where": "codec", "role": "all", "messages": outcome.total, "refused": outcome.refused}]
    rows += [
        {"where": "socket", "role": role, "messages": sent, "refused": done.refused.get(role)}
        for role, sent in done.sent.items()
    ]
    return Record(
        name="fuzz-wire",
        title="Fuzz of the wire: broken messages at codecs and sockets",
        command=command,
        machine=this_machine(),
        columns=_COLUMNS,
        rows=rows,
        facts={
            "summary": {
                "codec_messages": outcome.total,
                "codec_refused": outcome.refused,
                "socket_messages": sum(done.sent.values()),
                "unforeseen": 0,
            }
        },
        notes=[
            "Whatever was not refused was sound: encoded again, it decodes to the same. Anything but a message or a "
            "counted protocol error, an exception, an ended process or an error in a log among them, ends the run.",
            "At the sockets, messages that happened to be sound were sent too, and what they asked for was done; a "
            "message without frames cannot be sent.",
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
