"""What `odmoe-predictor` can be told, and how it says what it did."""

import dataclasses
import io
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from odmoe_model.quantize import QuantizationReport, Treated
from odmoe_predictor.config import Kind, Precision, PredictorSettings, Scope
from odmoe_predictor.process import QUANTIZERS
from odmoe_predictor.report import report_line, report_table
from odmoe_server.config import ServeSettings
from odmoe_server.launch_plan import Plan, children
from odmoe_wire.settings import SettingsError, load

REPORT = QuantizationReport(
    (
        Treated(
            what="experts", treatment="int8", reason="", weights=1_000_000, stored_bytes=2_000_000, held_bytes=1_010_000
        ),
        Treated(
            what="embeddings",
            treatment="kept",
            reason="looked up, not multiplied",
            weights=500_000,
            stored_bytes=1_000_000,
            held_bytes=1_000_000,
        ),
    )
)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--store", "x", "--precision", "int3"],
            "--precision: input should be 'fp16', 'int8', 'nf4' or 'int4', not 'int3'",
        ),
        (["--store", "x", "--scope", "layers"], "--scope: input should be 'model' or 'experts', not 'layers'"),
        (["--store", "x", "--presision", "int8"], "did you mean --precision"),
        (["--store", "x", "--threads", "0"], "--threads"),
        (["--store", "x", "--peer-id", "my predictor"], "--peer-id: needs 1 to 64 letters"),
        ([], "--store is required"),
        (["--store", "x", "--kind", "oracle"], "--kind: input should be 'shadow', 'random'"),
        (["--store", "x", "--kind", "random", "--precision", "int8"], "--precision says nothing with --kind random"),
        (["--store", "x", "--kind", "gate", "--scope", "model"], "--scope says nothing with --kind gate"),
        (["--store", "x", "--kind", "gate", "--device", "cuda:0"], "--device says nothing with --kind gate"),
        (["--store", "x", "--kind", "previous", "--run-ahead", "1"], "--run-ahead .* it is for shadow"),
        (["--store", "x", "--kind", "gate", "--no-feedback"], "--feedback says nothing .* it is for shadow"),
        (["--store", "x", "--look-ahead", "2"], "--look-ahead says nothing with --kind shadow; it is for gate"),
        (["--store", "x", "--kind", "gate", "--look-ahead", "0"], "--look-ahead"),
        (["--store", "x", "--kind", "frequency", "--weights", "w"], "--weights says nothing with --kind frequency"),
        (["--store", "x", "--kind", "trained"], "--kind trained needs --weights"),
        (["--store", "x", "--kind", "trained", "--weights", "w", "--look-ahead", "2"], "--look-ahead says nothing"),
    ],
)
def test_bad_settings_are_named(argv: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load(PredictorSettings, argv, prog="odmoe-predictor")


def test_defaults_fit_a_server_on_the_same_machine() -> None:
    settings = load(PredictorSettings, ["--store", "x"], prog="odmoe-predictor")
    assert settings.store == Path("x")
    assert (settings.peer_id, settings.precision, settings.scope) == ("predictor", "int8", "model")
    assert settings.threads == 1


def test_every_precision_has_its_quantizer() -> None:
    assert tuple(QUANTIZERS) == Precision.__args__


@pytest.mark.parametrize(("flag", "chosen"), [("precision", Precision), ("scope", Scope)])
def test_serve_offers_the_same_choices(flag: str, chosen: object) -> None:
    """It cannot import the predictor's."""
    assert ServeSettings.model_fields[f"shadow_{flag}"].annotation == chosen
    ours, theirs = PredictorSettings.model_fields[flag], ServeSettings.model_fields[f"shadow_{flag}"]
    assert ours.default == theirs.default


def test_serve_offers_the_same_kinds() -> None:
    """Also some that are refused: what the predictor would refuse, `odmoe serve` refuses before it starts one."""
    assert get_args(ServeSettings.model_fields["predictor_kind"].annotation) == get_args(Kind)


@pytest.mark.parametrize(
    ("chosen", "started"),
    [
        ({}, ("shadow", None, None)),
        ({"predictor_kind": "previous"}, ("previous", None, None)),
        ({"predictor_kind": "gate"}, ("gate", None, None)),
        ({"predictor_kind": "gate", "predictor_look_ahead": 3}, ("gate", 3, None)),
        ({"predictor_kind": "trained", "predictor_weights": Path(__file__)}, ("trained", None, Path(__file__))),
    ],
)
def test_serve_hands_on_the_kind(tmp_path: Path, chosen: dict[str, Any], started: tuple[object, ...]) -> None:
    settings = predictor_of(ServeSettings(**chosen), tmp_path)
    assert (settings.kind, settings.look_ahead, settings.weights) == started


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--predictor-kind", "gate", "--run-ahead", "2"], "--run-ahead says nothing with --predictor-kind gate"),
        (["--predictor-kind", "gate", "--align-kv", "2"], "--align-kv says nothing"),
        (["--predictor-kind", "random", "--feedback"], "--feedback says nothing with --predictor-kind random"),
        (["--predictor-kind", "random", "--align-token", "2"], "--align-token says nothing"),
        (["--predictor-kind", "random", "--prompt-kv", "own"], "--prompt-kv says nothing"),
        (["--predictor-kind", "random", "--shadow-precision", "nf4"], "--shadow-precision says nothing"),
        (["--predictor-kind", "random", "--shadow-scope", "experts"], "--shadow-scope says nothing"),
        (["--predictor-look-ahead", "2"], "--predictor-look-ahead says nothing with --predictor-kind shadow"),
        (["--predictor-weights", "w"], "--predictor-weights says nothing with --predictor-kind shadow"),
        (["--predictor-kind", "trained"], "needs --predictor-weights"),
        (["--predictor-kind", "trained", "--predictor-weights", "no/such"], "no/such is not there"),
        (["--no-predictor", "--predictor-kind", "gate"], "--predictor-kind gate says nothing with --no-predictor"),
    ],
)
def test_serve_refuses_what_says_nothing(argv: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load(ServeSettings, argv, prog="odmoe serve")


def predictor_of(settings: ServeSettings, directory: Path) -> PredictorSettings:
    """The settings `odmoe serve` starts its predictor with."""
    with socket.socket() as listener:
        plan = Plan(settings=settings, store=directory, top_k=2, runtime=directory, listener=listener, cores=2)
        (predictor,) = (spec for spec in children(plan) if spec.name == "predictor")
    return load(PredictorSettings, list(predictor.command)[3:], prog="odmoe-predictor")


def test_serve_hands_on_precision_and_scope(tmp_path: Path) -> None:
    started = predictor_of(ServeSettings(shadow_precision="nf4", shadow_scope="experts"), tmp_path)
    assert (started.precision, started.scope) == ("nf4", "experts")


@pytest.mark.parametrize("feedback", [True, False])
def test_serve_hands_on_whether_there_is_feedback(tmp_path: Path, feedback: bool) -> None:
    assert ServeSettings().feedback == load(PredictorSettings, ["--store", "x"], prog="odmoe-predictor").feedback
    assert predictor_of(ServeSettings(feedback=feedback), tmp_path).feedback == feedback


@pytest.mark.parametrize("precision", [*Precision.__args__, "bf16"])
def test_no_quantised_weight_is_called_not_quantised(precision: str) -> None:
    quantised = dataclasses.replace(REPORT.entries[0], treatment=precision)
    line = report_line(QuantizationReport((quantised, REPORT.entries[1])))
    assert line.endswith("not quantised: embeddings kept (looked up, not multiplied)")


@pytest.mark.parametrize("command", ["__main__", "rivals.train"])
def test_settings_are_judged_without_torch(command: str) -> None:
    code = f"import sys, odmoe_predictor.{command}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_report_names_what_was_not_quantised_and_why() -> None:
    line = report_line(REPORT)
    assert "25.2 %" in line
    assert "embeddings kept (looked up, not multiplied)" in line
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report_table(REPORT))
    text = console.export_text()
    for said in ("experts", "int8", "1.01", "embeddings", "kept", "looked up"):
        assert said in text
