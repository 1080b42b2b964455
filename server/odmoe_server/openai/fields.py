"""Fields of the OpenAI API and of its well-known dialects that are not implemented, and the values that ask nothing.

A known field is implemented or refused by name, never accepted and ignored: it is let through only with a value
which says what we do anyway. Knows names and values; does not know pydantic.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from odmoe_server.openai.errors import UnsupportedParameter

Neutral = tuple[Any, ...]

# Field -> the values that change nothing. Null is always one of them. These are vLLM's, SGLang's and llama.cpp's,
# refused wherever text is generated.
_EXTENSIONS: Final[Mapping[str, Neutral]] = {
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_path": (),
    "priority": (0,),
    "repetition_detection": (),
    "request_id": (),  # the header x-request-id is taken
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

CHAT_FIELDS: Mapping[str, Neutral] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "add_special_tokens": (False,),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "include_reasoning": (),
    "mm_processor_kwargs": ({},),
    **_EXTENSIONS,
}

COMPLETION_FIELDS: Mapping[str, Neutral] = {
    "best_of": (1,),
    "prompt_embeds": (),
    "suffix": ("",),
    **_EXTENSIONS,
}

STREAM_OPTION_FIELDS: Mapping[str, Neutral] = {
    "include_obfuscation": (False,),
}

MESSAGE_FIELDS: Mapping[str, Neutral] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
}


def without_neutral(fields: Any, *, not_yet: Mapping[str, Neutral], where: str = "") -> Any:
    """`fields` less those of `not_yet` that ask for nothing; what is no object is handed on untouched.

    Raises `UnsupportedParameter` for the first field that asks for something.
    """
    if not isinstance(fields, dict):
        return fields
    for name, neutral in not_yet.items():
        if not _asks_nothing(fields.get(name), neutral=neutral):
            raise UnsupportedParameter(
                f"'{name}' is not supported by this server{_allowed(neutral)}. Leave it out.", param=where + name
            )
    return {name: value for name, value in fields.items() if name not in not_yet}


def _asks_nothing(value: Any, *, neutral: Neutral) -> bool:
    # True == 1 in Python, but not in JSON.
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )


def _allowed(neutral: Neutral) -> str:
    return f" (only {' or '.join(json.dumps(value) for value in neutral)} is)" if neutral else ""
