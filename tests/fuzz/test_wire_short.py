"""`make fuzz` on the wire, short: some thousand broken messages at the codecs, some hundred at each real socket."""

from pathlib import Path

import pytest

from chaos import roles
from fuzz import codec, sockets
from support.serve_process import chat_store

CODEC_MESSAGES = 20_000
SOCKET_MESSAGES = 300


def test_codecs_refuse_or_understand() -> None:
    outcome = codec.run(count=CODEC_MESSAGES, seed=7, budget_s=60.0)
    assert outcome.total == CODEC_MESSAGES
    # Most are broken, some only say something else; a codec that refuses or takes everything would show here.
    assert CODEC_MESSAGES // 2 < outcome.refused < CODEC_MESSAGES * 0.99
    assert set(outcome.tried) == {"server", "node", "predictor"}


@pytest.mark.slow
def test_processes_bear_it(tmp_path: Path) -> None:
    roles.begin()
    done = sockets.run(count=SOCKET_MESSAGES, seed=7, store=chat_store(tmp_path), home=tmp_path)
    assert set(done.sent) == {"server", "node-1", "predictor"}
    assert min(done.refused.values()) > SOCKET_MESSAGES // 2
