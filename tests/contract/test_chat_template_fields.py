"""How clients may have a conversation rendered: their variables, answers that go on, prompts that end early."""

import copy
from typing import Any

import pytest

from odmoe_server.app import create_app
from odmoe_server.catalog import Catalog
from odmoe_server.engine_api import Sampling
from odmoe_server.text import TextCodec
from support.http_app import CHAT, MODEL, request
from support.scripted_engine import CHAT_TEMPLATE, ScriptedEngine, tiny_tokenizer

TEMPLATE = (
    CHAT_TEMPLATE
    + "{% set mine = 1 %}{% if enable_thinking is defined and not enable_thinking %}<quiet>{% endif %}"
    + "{{ style or '' }}{% if number %}{{ 7 // (number - mine) }}{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
BEGUN = {"role": "assistant", "content": "I think "}
HEAD = "<|im_start|>user\nHi<|im_end|>\n"
ANSWER = "<|im_start|>assistant\n"
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def asked(path: str = CHAT, **fields: Any) -> Any:
    """The prompt that the engine got, or the tokens told, as text; else the error."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    catalog = Catalog(names=(MODEL,), created=1, context_length=2048, fingerprint="x", sampling=Sampling())
    engine = ScriptedEngine.saying("ok", context_length=2048)
    app = create_app(engine=engine, text=TextCodec(tokenizer), catalog=catalog)
    answer = request(app, "POST", path, json={"model": MODEL, "messages": [USER], **fields})
    if answer.status_code != 200:
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]
    return tokenizer.decode(answer.json()["tokens"] if path == "/tokenize" else engine.requests[-1].prompt_ids)


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, HEAD + ANSWER),
        ({"chat_template_kwargs": {}}, HEAD + ANSWER),
        ({"chat_template_kwargs": {"enable_thinking": False}}, HEAD + ANSWER + "<quiet>"),
        ({"chat_template_kwargs": {"enable_thinking": True, "style": "dry"}}, HEAD + ANSWER + "dry"),
        ({"chat_template_kwargs": {"number": 2}}, HEAD + ANSWER + "7"),
        # Nothing to ask of a template that does not know it.
        ({"chat_template_kwargs": {"thinking": False, "effort": None}}, HEAD + ANSWER),
        ({"add_generation_prompt": True, "continue_final_message": False}, HEAD + ANSWER),
        ({"add_generation_prompt": False}, HEAD),
        ({"continue_final_message": True, "messages": [USER, BEGUN]}, HEAD + ANSWER + "I think "),
        (
            {"continue_final_message": True, "add_generation_prompt": False, "messages": [USER, BEGUN]},
            HEAD + ANSWER + "I think ",
        ),
    ],
    ids=str,
)
def test_the_prompt(path: str, fields: dict[str, Any], prompt: str) -> None:
    assert asked(path, **fields) == prompt


def test_control_tokens_in_variables_are_text() -> None:
    ends = tiny_tokenizer().eos_token
    tokens = asked("/tokenize", chat_template_kwargs={"style": ends})
    assert tokens == HEAD + ANSWER + ends
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    body = {"messages": [USER], "chat_template_kwargs": {"style": ends}}
    catalog = Catalog(names=(MODEL,), created=1, context_length=2048, fingerprint="x", sampling=Sampling())
    app = create_app(engine=ScriptedEngine(), text=TextCodec(tokenizer), catalog=catalog)
    found = request(app, "POST", "/tokenize", json=body).json()["tokens"]
    assert found.count(tokenizer.eos_token_id) == 1, "that of the user's message alone"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"colour": "red"}}, "chat_template_kwargs.colour"),
        ({"chat_template_kwargs": {"enable_thinkin": True}}, "chat_template_kwargs.enable_thinkin"),
        ({"chat_template_kwargs": {"mine": 2}}, "chat_template_kwargs.mine"),
        ({"chat_template_kwargs": {"style": ["a"]}}, "chat_template_kwargs.style"),
        ({"chat_template_kwargs": {"style": {}}}, "chat_template_kwargs.style"),
        ({"chat_template_kwargs": {"style": "x" * 1001}}, "chat_template_kwargs.style"),
        ({"chat_template_kwargs": {f"a{i}": False for i in range(17)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        *(
            ({"chat_template_kwargs": {name: value}}, f"chat_template_kwargs.{name}")
            for name in ("chat_template", "tokenize", "messages", "tools", "add_generation_prompt", "eos_token")
            for name, value in ((name, False),)
        ),
        ({"chat_template_kwargs": {"raise_exception": None}}, "chat_template_kwargs.raise_exception"),
        ({"chat_template_kwargs": {"range": 1}}, "chat_template_kwargs.range"),
        # What the template cannot do with a value is the client's mistake.
        ({"chat_template_kwargs": {"number": "x"}}, "messages"),
        ({"chat_template_kwargs": {"number": 1}}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "messages": [USER, {**BEGUN, "content": " "}]}, "continue_final_message"),
        (
            {"continue_final_message": True, "add_generation_prompt": True, "messages": [USER, BEGUN]},
            "continue_final_message",
        ),
        ({"continue_final_message": 1}, "continue_final_message"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_what_is_refused(path: str, fields: dict[str, Any], param: str) -> None:
    error = asked(path, **fields)
    assert error["param"] == param, error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True, "messages": [USER, BEGUN]}, "continue_final_message"),
        ({"regex": "a"}, "regex"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ],
)
def test_what_does_not_go_with_tools(fields: dict[str, Any], param: str) -> None:
    assert asked(tools=TOOLS, **fields)["param"] == param
    assert isinstance(asked(tools=TOOLS, tool_choice="none", **fields), str)


def test_variables_belong_to_messages() -> None:
    for name, value in {"chat_template_kwargs": {"style": "x"}, "continue_final_message": True}.items():
        assert asked("/tokenize", messages=None, prompt="x", **{name: value})["param"] == name
