"""The command that measures the shadow's recall, on a tiny model."""

import json
from pathlib import Path

import pytest

from bench import shadow_recall
from support.stores import tiny_store


def test_rows_for_every_precision_and_scope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tiny_store("mixtral", tmp_path, eos_token_id=126)
    argv = [str(store), "--tokens", "6", "--json", str(tmp_path / "rows.json"), "--token-ids", "3", "17", "99", "4"]
    shadow_recall.main(argv)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["precision"], row["scope"]) for row in rows] == [
        (precision, scope) for precision in ("fp16", "int8", "nf4", "int4") for scope in ("model", "experts")
    ]
    for row in rows:
        assert row["precision"] in printed
        assert f"{100 * row['recall']:.2f}" in printed
        assert row["tokens"] == 6
        assert row["ms_per_step"] > 0
    assert rows[1]["recall"] >= 0.9, "16-bit experts of a random model"
    assert min(row["recall"] for row in rows) > 0.4, "chance is 0.25"
    assert rows[0]["bytes"] > rows[2]["bytes"] > rows[4]["bytes"]


def test_answer_ends_where_the_model_stops(tmp_path: Path) -> None:
    store = shadow_recall.ExpertStore.open(tiny_store("mixtral", tmp_path), verify=False)
    (steps,) = shadow_recall.answers(store, [[3, 17, 99, 4]], tokens=5)
    stop = steps[2].token
    full = shadow_recall.FullModel(store)
    cut = list(shadow_recall._answer(full, [3, 17, 99, 4], tokens=5, stops={stop}))
    first = [step.token for step in steps].index(stop)
    assert [step.token for step in cut] == [step.token for step in steps[:first]]
    assert [step.position for step in steps] == [4, 5, 6, 7, 8]


def test_no_answer_is_no_measurement(tmp_path: Path) -> None:
    store = tiny_store("mixtral", tmp_path)
    with pytest.raises(SystemExit, match="nothing to say"):
        shadow_recall.main([str(store), "--tokens", "0", "--token-ids", "3"])
