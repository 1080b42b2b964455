"""The `odmoe` command: what it prints, its exit statuses, and that users see lines instead of traces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from odmoe_server import cli, models
from odmoe_server.config import ServeSettings
from odmoe_server.serving import api_keys

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("command", ["serve", "server", "prepare", "make-checkpoint", "chat", "keys"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = RUNNER.invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert "usage" in (result.output + capsys.readouterr().out).lower()


def test_train_predictor_is_the_predictors_own_program(tmp_path: Path) -> None:
    """It takes the place of the process, so that signals and statuses are its own."""
    command = [sys.executable, "-m", "odmoe_server", "train-predictor"]
    asked = subprocess.run([*command, "--help"], check=False, capture_output=True, text=True, timeout=120)
    assert asked.returncode == 0
    assert "usage: odmoe train-predictor" in asked.stdout
    for flag in ("TRACE", "--out", "--look-ahead"):
        assert flag in asked.stdout
    missing = [*command, "no-such", "--out", "w"]
    failed = subprocess.run(missing, check=False, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1
    assert "odmoe train-predictor: " in failed.stderr
    assert "no-such" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_version() -> None:
    result = RUNNER.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("odmoe ")


@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["serve", "--prot", "1"], 2, "did you mean --port?"),
        (["server", "--port", "x"], 2, "--port"),
        (["server", "--model", "no-such"], 1, "there is no model 'no-such'"),
        (["prepare"], 2, "odmoe prepare SRC DST"),
        (["prepare", "a", "b", "--builtin", "default"], 2, "--builtin"),
        (["prepare", "no-such"], 1, "there is no model 'no-such'"),
        (["make-checkpoint", "dst", "--family", "llama"], 1, "there is no family 'llama'"),
        (["make-checkpoint", "dst", "--dtype", "int8"], 1, "fp32 or bf16, not 'int8'"),
        (["make-checkpoint", "dst", "--set", "head_dim"], 1, "NAME=JSON, not 'head_dim'"),
        (["make-checkpoint", "dst", "--set", "hidden_act=silu"], 1, "'silu' is no JSON"),
        (["make-checkpoint", "."], 1, ". exists already"),
        (["chat", "Hi", "--url", "http://127.0.0.1:9"], 1, "odmoe serve"),
    ],
)
def test_failures_are_lines(argv: list[str], status: int, says: str) -> None:
    result = RUNNER.invoke(cli.app, argv)
    assert result.exit_code == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("argv", "model", "place"),
    [
        (["src"], "src", None),
        (["src", "dst"], "src", "dst"),
        (["--builtin", "default"], "default", None),
        (["--builtin", "partitioned", "dst"], "partitioned", "dst"),
    ],
)
def test_what_is_prepared_where(
    argv: list[str], model: str, place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def make(model: str, destination: Path | None, **options: object) -> Path:
        asked.append((model, destination))
        return Path("/the/store")

    monkeypatch.setattr(models, "make_store", make)
    result = RUNNER.invoke(cli.app, ["prepare", *argv])
    assert result.exit_code == 0
    assert result.stdout == "/the/store\n"
    assert asked == [(model, None if place is None else Path(place))]


def test_an_interrupted_preparation_has_the_status_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*args: object, **options: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "make_store", make)
    assert RUNNER.invoke(cli.app, ["prepare", "src"]).exit_code == 130


def test_a_random_checkpoint_of_the_shape_that_was_asked_for(tmp_path: Path) -> None:
    sizes = "--layers 1 --experts 3 --top-k 1 --hidden 32 --intermediate 16 --vocab 300 --context 64 --heads 2"
    argv = ["make-checkpoint", "dst", "--family", "qwen3_moe", "--dtype", "bf16", "--set", "norm_topk_prob=false"]
    result = RUNNER.invoke(cli.app, [*argv, *sizes.split(), "--kv-heads", "1", "--seed", "3"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "dst\n"
    assert "in experts" in result.stderr
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    wanted = {
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "num_hidden_layers": 1,
        "num_experts_per_tok": 1,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "norm_topk_prob": False,
    }
    assert {name: config[name] for name in wanted} == wanted
    assert 3 in (config.get("num_experts"), config.get("num_local_experts"))


def test_keys_are_made_once(tmp_path: Path) -> None:
    first = RUNNER.invoke(cli.app, ["keys", "k", "--nodes", "2"]).output.split()
    assert sorted(Path(name).name for name in first if "secret" in name) == [
        "node-0.key_secret",
        "node-1.key_secret",
        "predictor.key_secret",
        "server.key_secret",
    ]
    assert RUNNER.invoke(cli.app, ["keys", "k", "--nodes", "2"]).output == ""


def test_a_place_that_cannot_be_used_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = subprocess.run(
        [sys.executable, "-m", "odmoe_server", "keys", "file/keys"],
        check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert asked.returncode == 1
    assert asked.stderr.startswith("odmoe: cannot use file/")
    assert len(asked.stderr.splitlines()) == 1


def test_a_thin_command_loads_no_torch() -> None:
    probe = "import sys, odmoe_server.cli, odmoe_server.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], timeout=60, env=dict(os.environ), check=False).returncode == 0


def test_keys_from_setting_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfrom-file\n  another \n")
    settings = ServeSettings(api_key=SecretStr("given"), api_key_file=file)
    assert api_keys(settings) == ["given", "from-file", "another"]
    assert api_keys(ServeSettings()) == []


def test_a_key_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="no key in it"):
        api_keys(ServeSettings(api_key_file=file))
    with pytest.raises(ValueError, match="cannot be read"):
        api_keys(ServeSettings(api_key_file=tmp_path / "missing"))
