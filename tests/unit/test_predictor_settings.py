"""What `odmoe-predictor` can be told, and how it says what it did."""

import dataclasses
import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from odmoe_model.quantize import QuantizationReport, Treated
from odmoe_predictor.config import Precision, PredictorSettings, Scope
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


def test_serve_hands_on_precision_and_scope(tmp_path: Path) -> None:
    settings = ServeSettings(shadow_precision="nf4", shadow_scope="experts")
    with socket.socket() as listener:
        plan = Plan(settings=settings, store=tmp_path, top_k=2, runtime=tmp_path, listener=listener, cores=2)
        (predictor,) = (spec for spec in children(plan) if spec.name == "predictor")
    started = load(PredictorSettings, list(predictor.command)[3:], prog="odmoe-predictor")
    assert (started.precision, started.scope) == ("nf4", "experts")


@pytest.mark.parametrize("precision", [*Precision.__args__, "bf16"])
def test_no_quantised_weight_is_called_not_quantised(precision: str) -> None:
    quantised = dataclasses.replace(REPORT.entries[0], treatment=precision)
    line = report_line(QuantizationReport((quantised, REPORT.entries[1])))
    assert line.endswith("not quantised: embeddings kept (looked up, not multiplied)")


def test_settings_are_judged_without_torch() -> None:
    code = "import sys, odmoe_predictor.__main__; sys.exit('torch' in sys.modules)"
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
