"""What `odmoe bench serve` measures: variants, loads and the settings of our own server. Starts nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from odmoe_server.config import ServeSettings

NAME: Final = "bench"
ODMOE: Final = "odmoe"
ONE_BY_ONE: Final = "transformers, one by one"
BATCHED: Final = "transformers, in batches"
FRONT: Final = "front end alone"
_VARIANTS: Final = {"odmoe": ODMOE, "one-by-one": ONE_BY_ONE, "batched": BATCHED, "front": FRONT}


@dataclass(frozen=True, kw_only=True)
class Question:
    """Each stream asks `repeats` times; lengths of prompts take turns. With `url`, a server that runs already is
    measured in odmoe's place, and must serve the same model."""

    store: Path
    streams: Sequence[int]
    prompt_tokens: Sequence[int]
    long_prompt_tokens: int
    tokens: int
    repeats: int
    front_tokens: int
    settings: ServeSettings
    url: str | None
    variants: Sequence[str]

    def facts(self) -> dict[str, Any]:
        """For the record."""
        own = {name: getattr(self.settings, name) for name in ("nodes", "slots", "draft", "max_running")}
        return {
            "store": self.store.name,
            "prompt_tokens": list(self.prompt_tokens),
            "long_prompt_tokens": self.long_prompt_tokens,
            "tokens": self.tokens,
            "repeats": self.repeats,
            "url": self.url,
            "settings": own,
        }


def question(
    *,
    store: Path,
    quick: bool,
    url: str | None,
    streams: Sequence[int] | None,
    tokens: int | None,
    repeats: int,
    names: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> Question:
    """Raises ValueError with a message for the user."""
    unknown = [name for name in names or () if name not in _VARIANTS]
    if unknown:
        raise ValueError(f"no variant is called {unknown[0]}; there are {', '.join(_VARIANTS)}")
    return Question(
        store=store,
        streams=streams or ((1, 2, 4) if quick else (1, 2, 4, 8, 16)),
        prompt_tokens=(16, 48) if quick else (16, 64, 256),
        long_prompt_tokens=256 if quick else 1024,
        tokens=tokens or (8 if quick else 32),
        repeats=repeats,
        front_tokens=500 if quick else 2000,
        settings=ServeSettings(
            model=str(store), served_model_names=(NAME,), threads=1, drain_s=0, max_queued=1024, **settings
        ),
        url=url,
        variants=[_VARIANTS[name] for name in names] if names else tuple(_VARIANTS.values()),
    )
