"""A record of `odmoe bench decode` as the timing model reads it: strictly. Knows names and bounds; predicts nothing.

What else a record holds is for people and is passed over.
"""

from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_MOST_BYTES: Final = 16 * 2**20
_MOST_PROBLEMS: Final = 5

Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class RecordedShape(_Part):
    """Counts of the model that was measured."""

    moe_layers: int = Field(ge=1, le=1000)
    experts: int = Field(ge=1, le=65536)
    top_k: int = Field(ge=1, le=256)


class RecordedQuestion(_Part):
    """How it was measured; `tokens` were decoded after each prompt, the first of which the prompt gives."""

    nodes: int = Field(ge=1, le=4096)
    group_size: int = Field(ge=1, le=4096)
    tokens: int = Field(ge=2, le=65536)


class RecordedRow(_Part):
    """One variant at one speed of the links. A load takes `link_ratio` layers; `recall` counts forecasts that came late
    too; `loads` were made while `tokens` tokens were decoded."""

    variant: str = Field(min_length=1, max_length=64)
    link_ratio: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)
    slots: int | None = Field(default=None, ge=1, le=1_000_000)
    tokens_per_s: float = Field(gt=0, le=1e9, allow_inf_nan=False)
    ttft_s: Seconds | None = None
    recall: Share | None = None
    agreement: Share | None = None
    loads: int | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=1)


class WithoutLoads(_Part):
    """A variant measured with loads that take next to nothing: a layer of decoding, and a first token."""

    layer_s: Seconds
    first_s: Seconds


class BenchRecord(_Part):
    """What was measured of the parts, and the rows.

    `main_s` is what a layer takes outside its experts and `expert_s` one expert; `layer_s` a whole layer of the
    resident run, by which links are set; `without_loads` tells what messages take, `shadow_layer_s` what a layer of the
    shadow takes; `first_stage` is as in `machines.Times`."""

    shape: RecordedShape
    question: RecordedQuestion
    main_s: Seconds
    expert_s: Seconds
    layer_s: Seconds
    without_loads: dict[str, WithoutLoads] = Field(default_factory=dict, max_length=64)
    shadow_layer_s: Seconds | None = None
    first_stage: Share = 0.0
    rows: list[RecordedRow] = Field(min_length=1, max_length=1000)


def read(path: Path) -> BenchRecord:
    """The record in a file. Raises ValueError, which names the file and what is wrong with it."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path} is no record of odmoe bench decode: it has more than {_MOST_BYTES} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return BenchRecord.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{path} is no record of odmoe bench decode: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)
    told = [f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in found[:_MOST_PROBLEMS]]
    return "; ".join([*told, f"and {len(found) - len(told)} more"] if len(found) > len(told) else told)
