"""The fields that chat and text completions share: sampling, where an answer ends, what is streamed and reported.

Knows names, ranges and `Sampling`; not prompts.
"""

from dataclasses import replace
from typing import Annotated, Any, Final, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from odmoe_server.engine_api import Sampling
from odmoe_server.limits import ServiceLimits
from odmoe_server.openai.body import Body
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.fields import STREAM_OPTION_FIELDS, without_neutral
from odmoe_server.openai.forms import Formed

MAX_STOP_CHARS: Final = 1000
MAX_TOP_LOGPROBS: Final = 20
MAX_BAD_WORDS: Final = 64  # of which each forbids two tokens at most, so that some are left
MAX_SALT_CHARS: Final = 256
_INT64: Final = 2**63
_Word = Annotated[str, StringConstraints(min_length=1, max_length=100)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Body):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generating(Formed):
    """Base of the requests for text. Those with no default of OpenAI's take the model's own."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[str, _Bias] | None = None
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: Annotated[tuple[_Stop, ...], Field(strict=False)] | None = None
    stop_token_ids: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    # Ours: how far an expert's score may be from the next one's to be replaced by what is at hand; 0 replaces none.
    expert_substitution: float | None = Field(default=None, ge=0, le=1)
    # Ours: objects in the answer.
    return_metrics: bool | None = None
    return_expert_stats: bool | None = None
    # vLLM's: what is told of tokens.
    return_token_ids: bool | None = None
    return_routed_experts: bool | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    # vLLM's: tokens the answer is made of, words it must not have, how much of the prompt's end is taken, and who
    # else's prompts may speed this one up: those with the same salt.
    allowed_token_ids: Annotated[tuple[int, ...], Field(min_length=1, strict=False)] | None = None
    bad_words: Annotated[tuple[_Word, ...], Field(max_length=MAX_BAD_WORDS, strict=False)] | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1)
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    # Accepted because it does not touch the answer.
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stream_options", mode="before")
    @classmethod
    def _options_by_name(cls, options: Any) -> Any:
        return without_neutral(options, not_yet=STREAM_OPTION_FIELDS, where="stream_options.")

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_come_whole(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("'prompt_logprobs' is not available in streams.", param="prompt_logprobs")
        return self

    @property
    def num_prompt_logprobs(self) -> int | None:
        """None for no log probabilities of the prompt, else how many of the likeliest tokens' come with each."""
        return self.prompt_logprobs

    @property
    def token_limit(self) -> int | None:
        """The most tokens the client wants."""
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        """Whether each chunk of a stream says how many tokens there are so far."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def num_top_logprobs(self) -> int | None:
        """None for no log probabilities, else how many of the likeliest tokens' come with each token."""
        raise NotImplementedError

    def sampling(self, default: Sampling, *, vocab_size: int) -> Sampling:
        """How the engine is to choose, `default` where nothing is said. Raises InvalidRequest."""
        asked = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        return replace(
            default,
            **{name: value for name, value in asked.items() if value is not None},
            logit_bias=self._biases(vocab_size),
            stop_token_ids=self._stop_ids(vocab_size),
            top_logprobs=self.num_top_logprobs,
        )

    def check(self, limits: ServiceLimits) -> None:
        """What can be refused before anything is tokenised. Raises InvalidRequest."""
        if len(self.stop or ()) > limits.max_stops:
            raise InvalidRequest(f"This server takes at most {limits.max_stops} stop strings.", param="stop")
        if self.min_tokens and self.token_limit is not None and self.min_tokens > self.token_limit:
            raise InvalidRequest("'min_tokens' must not be more than 'max_tokens'.", param="min_tokens")
        if self.expert_substitution and not limits.substitutes:
            raise InvalidRequest("This server replaces no experts.", param="expert_substitution")
        self._check_bounds()

    @property
    def bound(self) -> str | None:
        """The field that says of what the answer is made, if one does. Raises InvalidRequest if several do."""
        form = self.form
        found = [] if form is None else [form.param]
        found += [name for name in ("allowed_token_ids", "bad_words") if getattr(self, name)]
        if len(found) > 1:
            text = f"'{found[1]}' cannot be followed together with '{found[0]}'. Leave one of them out."
            raise InvalidRequest(text, param=found[1])
        return found[0] if found else None

    def _check_bounds(self) -> None:
        if self.bound is not None and self.form is not None:
            self.check_end()

    def check_end(self) -> None:
        """Of an answer whose form says where it ends. Raises InvalidRequest."""
        for name in ("ignore_eos", "min_tokens"):
            if getattr(self, name):
                raise InvalidRequest(f"'{name}' contradicts the end of a call or of an answer's form.", param=name)

    def within(self, tenant: str) -> str:
        """Whose prompts this one may share the computed heads of: the tenant's, with the same salt."""
        return tenant if self.cache_salt is None else f"{tenant}\n{self.cache_salt}"

    def truncated(self, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
        """As much of the prompt's end as was asked for."""
        return prompt_ids if self.truncate_prompt_tokens is None else prompt_ids[-self.truncate_prompt_tokens :]

    def _biases(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        return tuple((_token_id(key, vocab_size), bias) for key, bias in (self.logit_bias or {}).items())

    def _stop_ids(self, vocab_size: int) -> frozenset[int]:
        wrong = [token_id for token_id in self.stop_token_ids or () if not 0 <= token_id < vocab_size]
        if wrong:
            raise InvalidRequest(f"This model has no token {wrong[0]}.", param="stop_token_ids")
        return frozenset(self.stop_token_ids or ())


_SAMPLING_FIELDS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
)


def check_choices(n: int | None, *, num_prompts: int = 1, limits: ServiceLimits) -> int:
    """How many answers a request asks for. Raises InvalidRequest."""
    num_choices = (n or 1) * num_prompts
    if num_choices > limits.max_choices:
        raise InvalidRequest(
            f"This server gives at most {limits.max_choices} choices to a request, not {num_choices}.", param="n"
        )
    return num_choices


def seeded(sampling: Sampling, *, number: int) -> Sampling:
    """For the `number`th answer of one request: each draws otherwise, and the same again for the same seed."""
    if sampling.seed is None or number == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + _INT64 + number) % (2 * _INT64) - _INT64)


def _token_id(key: str, vocab_size: int) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 12):
        raise InvalidRequest(f"The keys of 'logit_bias' must be token ids, not '{key}'.", param="logit_bias")
    if int(key) >= vocab_size:
        raise InvalidRequest(f"This model has no token {key}.", param="logit_bias")
    return int(key)
