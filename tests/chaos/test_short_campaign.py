"""`make chaos`, short: some faults on real processes under load, some of every role."""

from pathlib import Path

import pytest

from chaos.campaign import Plan, run
from chaos.clients import questions
from chaos.report import record_of
from odmoe_model.prepare import prepare
from support.serve_process import chat_checkpoint

pytestmark = pytest.mark.slow
FAULTS = 10


def test_ten_faults(tmp_path: Path) -> None:
    checkpoint = chat_checkpoint(tmp_path / "checkpoint")
    prepare(checkpoint, tmp_path / "store")
    plan = Plan(
        store=tmp_path / "store",
        home=tmp_path,
        questions=questions(checkpoint, num_tokens=16),
        faults=FAULTS,
        nodes=3,
        clients=2,
        pace_s=0.2,
        most_hold_s=0.6,
        budget_s=60.0,
    )
    ledger = run(plan)
    assert len(ledger.happened) > FAULTS // 2, "a slow machine may not come to all of them"
    assert [asked.detail for asked in ledger.asked if asked.outcome == "wrong"] == []
    assert [asked.detail for asked in ledger.failed()] == []
    assert sum(asked.outcome == "right" for asked in ledger.asked) > 0
    record = record_of(ledger, plan=plan, took_s=1.0)
    assert record.facts["summary"]["faults"] == len(ledger.happened)
    assert "recovery" in record.markdown(picture=None)
