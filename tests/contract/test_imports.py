"""What importing a package may bring along: a node needs no web stack, the wire no tensors, arrows point down.

Imports are tried in processes of their own, because this one has long loaded everything.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WEB_STACK = ("fastapi", "starlette", "uvicorn", "typer", "prometheus_client")
TENSORS = ("torch", "transformers")
ROLES = ("odmoe_server", "odmoe_node", "odmoe_predictor")

# Imports every module of the package, then prints which of the unwanted ones came along.
PROBE = """
import importlib, pkgutil, sys
package, *unwanted = sys.argv[1:]
path = importlib.import_module(package).__path__
for module in pkgutil.walk_packages(path, package + "."):
    importlib.import_module(module.name)
print(*sorted(set(unwanted) & set(sys.modules)))
"""


def loaded(package: str, *unwanted: str) -> list[str]:
    """Those of the unwanted modules that importing the whole package loads."""
    command = [sys.executable, "-c", PROBE, package, *unwanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("package", ["odmoe_node", "odmoe_predictor"])
def test_no_web_stack_and_no_other_role(package: str) -> None:
    others = [role for role in ROLES if role != package]
    assert loaded(package, *WEB_STACK, *others) == []


def test_the_wire_loads_no_tensors_library() -> None:
    assert loaded("odmoe_wire", *WEB_STACK, *TENSORS, *ROLES, "odmoe_model") == []


def test_the_model_package_knows_no_role() -> None:
    assert loaded("odmoe_model", *WEB_STACK, *ROLES) == []


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded("json", "json.decoder", "torch") == ["json.decoder"]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    return subprocess.run(
        [*command, "--no-cache", "--no-logo"], cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )


def test_import_arrows_point_down() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("odmoe_node/state.py", "import odmoe_server"),
        ("odmoe_wire/codec.py", "import odmoe_model"),
        ("odmoe_wire/codec.py", "import torch"),
        ("odmoe_model/store.py", "import fastapi"),
    ],
)
def test_a_planted_import_is_reported(tmp_path: Path, module: str, planted: str) -> None:
    for package in (*ROLES, "odmoe_model", "odmoe_wire"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / module).write_text(planted + "\n")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
