"""`make chaos`, short: some faults on real processes under load, some of every role."""

from pathlib import Path

import pytest

from chaos.campaign import Plan, run
from chaos.clients import questions
from chaos.faults import OF_FRAMES
from chaos.report import record_of
from odmoe_model.prepare import prepare
from support.serve_process import chat_checkpoint

pytestmark = pytest.mark.slow
FAULTS = {"plain": 10, "curve": 5}


@pytest.mark.parametrize("links", FAULTS)
def test_some_faults(tmp_path: Path, links: str) -> None:
    curve = links == "curve"
    checkpoint = chat_checkpoint(tmp_path / "checkpoint")
    prepare(checkpoint, tmp_path / "store")
    plan = Plan(
        store=tmp_path / "store",
        home=tmp_path,
        questions=questions(checkpoint, num_tokens=16),
        faults=FAULTS[links],
        nodes=3,
        clients=2,
        pace_s=0.2,
        most_hold_s=0.6,
        budget_s=60.0,
        curve=curve,
    )
    ledger = run(plan)
    assert len(ledger.happened) > FAULTS[links] // 2, "a slow machine may not come to all of them"
    assert [asked.detail for asked in ledger.asked if asked.outcome == "wrong"] == []
    assert [asked.detail for asked in ledger.failed()] == []
    assert sum(asked.outcome == "right" for asked in ledger.asked) > 0
    if curve:
        assert not {h.fault.kind for h in ledger.happened} & OF_FRAMES
        logs = (tmp_path / "server.log").read_text()
        assert "joined" in logs
    record = record_of(ledger, plan=plan, took_s=1.0, encrypted=ledger if curve else None)
    assert ("under_curve" in record.facts["summary"]) is curve
    assert record.facts["summary"]["faults"] == len(ledger.happened)
    assert "recovery" in record.markdown(picture=None)
