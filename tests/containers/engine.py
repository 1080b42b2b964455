"""A container engine and a base image, wherever they come from on this machine, or the reason why there are none.

Beside this repository there may be a tool that makes both (ODMOE_BASE_IMAGE_TOOL names another); else the engine,
Compose and public base image of the user's are taken.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_TOOL: Final = ROOT.parent / "shared" / "tools" / "local-base-image"
# What the Dockerfile builds on when nobody names another.
PUBLIC_BASE: Final = "python:3.11-slim-bookworm"
_TOOL_S: Final = 600
_QUICK_S: Final = 60


class NoEngine(Exception):
    """Containers cannot run here; the text says why."""


@dataclass(frozen=True)
class Engine:
    """`compose` is the command; `build_args` are for docker build."""

    compose: Sequence[str]
    build_args: Sequence[str]
    environment: Mapping[str, str]

    def run(self, *command: str, timeout_s: float = _QUICK_S, **environment: str) -> str:
        """What a command prints. Raises AssertionError with all it said when it fails."""
        whole = {**os.environ, **self.environment, **environment}
        done = subprocess.run(
            command, cwd=ROOT, env=whole, capture_output=True, text=True, check=False, timeout=timeout_s
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()


def find() -> Engine:
    """Raises NoEngine."""
    tool = Path(os.environ.get("ODMOE_BASE_IMAGE_TOOL", _TOOL))
    if tool.is_file():
        return _with_tool(tool)
    if shutil.which("docker") is None:
        raise NoEngine("there is no docker command")
    info = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False, timeout=_QUICK_S)
    if info.returncode != 0:
        raise NoEngine(f"no container engine answers: {info.stderr.strip().splitlines()[-1:]}")
    compose = _compose()
    pulled = subprocess.run(
        ["docker", "pull", "-q", PUBLIC_BASE], capture_output=True, text=True, check=False, timeout=_TOOL_S
    )
    if pulled.returncode != 0:
        raise NoEngine(f"the base image {PUBLIC_BASE} cannot be had: {pulled.stderr.strip().splitlines()[-1:]}")
    return Engine(compose, (), {})


def _with_tool(tool: Path) -> Engine:
    """Its engine has no BuildKit, and its images come from no registry."""
    done = subprocess.run([tool], capture_output=True, text=True, check=False, timeout=_TOOL_S)
    if done.returncode != 0:
        raise NoEngine(f"{tool}: {done.stderr.strip()}")
    base = done.stdout.strip().splitlines()[-1]
    arguments = ("--network=host", f"--build-arg=BASE_IMAGE={base}", "--build-arg=TORCH_INDEX=")
    return Engine(_compose(), arguments, {"DOCKER_BUILDKIT": "0"})


def _compose() -> Sequence[str]:
    plugin = ["docker", "compose"]
    if subprocess.run([*plugin, "version"], capture_output=True, check=False, timeout=_QUICK_S).returncode == 0:
        return plugin
    if shutil.which("docker-compose") is None:
        raise NoEngine("there is neither docker compose nor docker-compose")
    return ["docker-compose"]
