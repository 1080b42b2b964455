"""`make chaos`: a campaign on real processes, its figures and their record. Exit status 1 when a promise broke."""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from chaos import campaign
from chaos.clients import questions
from chaos.report import promises_broken, record_of, under_curve
from odmoe_model.prepare import prepare
from odmoe_server.bench.record import results_directory
from support.serve_process import chat_checkpoint


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20_260_101)
    parser.add_argument("--curve-faults", type=int, default=40, help="of a second campaign, on encrypted links")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24, help="length of each answer")
    parser.add_argument("--budget-s", type=float, default=900.0, help="no fault begins later than this")
    parser.add_argument("--out", type=Path, help="folder of the record; by default tests/bench/results")
    parser.add_argument("--logs", type=Path, help="folder for the roles' logs; by default they are thrown away")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="odmoe-chaos-") as scratch:
        home = Path(scratch)
        checkpoint = chat_checkpoint(home / "checkpoint")
        prepare(checkpoint, home / "store")
        logs = options.logs or home
        logs.mkdir(parents=True, exist_ok=True)
        began_s = time.monotonic()
        plan = campaign.Plan(
            store=home / "store",
            home=logs,
            questions=questions(checkpoint, num_tokens=options.tokens),
            faults=options.faults,
            seed=options.seed,
            nodes=options.nodes,
            clients=options.clients,
            budget_s=options.budget_s,
            say=lambda text: console.print(text, markup=False, highlight=False),
        )
        ledger = campaign.run(plan)
        took_s, encrypted = time.monotonic() - began_s, None
        if options.curve_faults:
            console.print("now under CURVE")
            (logs / "curve").mkdir(exist_ok=True)
            encrypted = campaign.run(replace(plan, curve=True, faults=options.curve_faults, home=logs / "curve"))
    record = record_of(ledger, plan=plan, took_s=took_s, encrypted=encrypted)
    console.print(record.table())
    for name, value in {**ledger.summary(), **under_curve(encrypted)}.items():
        console.print(f"{name:<26} {value}", highlight=False)
    folder = options.out or results_directory()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record.stem}.json").write_text(record.json(), encoding="utf-8")
    (folder / f"{record.stem}.md").write_text(record.markdown(picture=None), encoding="utf-8")
    broken = promises_broken(ledger)
    broken += [] if encrypted is None else [f"under CURVE: {sentence}" for sentence in promises_broken(encrypted)]
    for sentence in broken:
        console.print(f"BROKEN: {sentence}", style="red", highlight=False, markup=False)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
