"""The systemd units: their flags are odmoe's, their settings systemd's, as far as a file can tell."""

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from odmoe_node.config import NodeSettings
from odmoe_predictor.config import PredictorSettings
from odmoe_server.config import ServerSettings
from odmoe_wire.settings import RoleSettings, parse

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS: dict[str, tuple[str, type[RoleSettings]]] = {
    "odmoe-server.service": ("odmoe server", ServerSettings),
    "odmoe-predictor.service": ("odmoe-predictor", PredictorSettings),
    "odmoe-node@.service": ("odmoe-node", NodeSettings),
}


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names are told apart by case
    parser.read_string((FOLDER / name).read_text("utf-8"))
    return parser


def test_every_unit_is_looked_at() -> None:
    assert {path.name for path in FOLDER.glob("*.service")} == set(UNITS)


@pytest.mark.parametrize("name", UNITS)
def test_its_command_is_one_of_ours(name: str) -> None:
    program, role = UNITS[name]
    command, *args = shlex.split(unit(name)["Service"]["ExecStart"].replace("%i", "node-0"))
    wanted, *subcommand = program.split()
    assert Path(command) == Path("/opt/odmoe/bin", wanted)
    assert args[: len(subcommand)] == subcommand
    settings: Any = parse(role, args[len(subcommand) :], prog=program)
    if role is ServerSettings:
        assert int(unit(name)["Service"]["TimeoutStopSec"]) > settings.drain_s


@pytest.mark.parametrize("name", UNITS)
def test_it_runs_with_few_rights_and_comes_back(name: str) -> None:
    service = unit(name)["Service"]
    assert (service["User"], service["NoNewPrivileges"], service["CapabilityBoundingSet"]) == ("odmoe", "yes", "")
    assert service["Restart"] == "always"
    assert unit(name)["Unit"]["StartLimitIntervalSec"] == "0"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_it(name: str, tmp_path: Path) -> None:
    """But for the command, which is not there."""
    text = (FOLDER / name).read_text("utf-8")
    ours = unit(name)["Service"]["ExecStart"]
    copy = tmp_path / name.replace("@", "@node-0")
    copy.write_text(text.replace(ours, "/bin/true").replace("User=odmoe", "User=root").replace("Group=odmoe\n", ""))
    command = ["systemd-analyze", "verify", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    complaints = [line for line in done.stderr.splitlines() if copy.name in line]
    assert not complaints
