"""Fields of the OpenAI API and of its well-known dialects that are not implemented, and the values that ask nothing.

A known field is implemented or refused by name, never accepted and ignored: it is let through only with a value
which says what we do anyway. Knows names and values; does not know pydantic.
"""

from collections.abc import Mapping
from typing import Any

from odmoe_server.openai.errors import UnsupportedParameter

Neutral = tuple[Any, ...]

# Field -> the values that change nothing. Null is always one of them.
CHAT_FIELDS: Mapping[str, Neutral] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),  # speaks of tools only, and there are none
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM, SGLang and llama.cpp
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "regex": (),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "top_k": (-1, 0),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

STREAM_OPTION_FIELDS: Mapping[str, Neutral] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False,),
}

MESSAGE_FIELDS: Mapping[str, Neutral] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
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
    return f" (only {' or '.join(repr(value) for value in neutral)} is)" if neutral else ""
