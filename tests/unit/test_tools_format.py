"""Formats learnt from templates, conversations told to templates that know no tools, and the grammar of calls."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from odmoe_server.grammars import GrammarError, Grammars
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.tools import ToolOptions, grammar_of_calls
from odmoe_server.openai.tools_format import OWN, Message, Render, ToolFormat, learn, plain
from odmoe_server.openai.tools_parse import CallArguments, CallBegun, CallParser
from support.drawn_answers import END, drawn
from support.scripted_engine import CHAT_TEMPLATE, tiny_tokenizer, words
from support.tool_templates import HERMES, LIST, TAGGED

ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", '"}']}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def render_with(template: str) -> Render:
    def render(messages: Sequence[Message], tools: Sequence[Message], add_generation_prompt: bool) -> str:
        return str(
            tiny_tokenizer().apply_chat_template(
                list(messages),
                tools=list(tools),
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        )

    return render


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def options(**fields: Any) -> ToolOptions:
    return ToolOptions.model_validate({"tools": (tool("add", ADD), tool("now")), **fields}).check()


def _changed(template: str, old: str, new: str) -> str:
    assert old in template
    return template.replace(old, new)


def learnt(template: str, *, control_tokens: tuple[str, ...] = ("<|im_end|>",)) -> ToolFormat:
    return learn(render_with(template), control_tokens=control_tokens)


def test_the_format_of_a_template_is_learnt() -> None:
    found = learnt(HERMES)
    assert found.native
    assert (found.begin, found.middle, found.between, found.end) == (OWN.begin, OWN.middle, OWN.between, OWN.end)
    assert found.trigger == "<tool_call>"


def test_a_list_of_calls_is_learnt() -> None:
    found = learnt(LIST)
    assert found.written([("a", "{}"), ("b", '{"x": 1}')]) == (
        '[CALLS][{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}]'
    )
    assert found.trigger == "[CALLS]["


def test_a_name_outside_of_the_json_is_learnt() -> None:
    found = learnt(TAGGED)
    assert found.written([("a", "{}"), ("b", "{}")]) == "<function=a>{}</function><function=b>{}</function>"


@pytest.mark.parametrize(
    ("template", "control_tokens"),
    [
        (CHAT_TEMPLATE, ()),  # does not know tools
        (HERMES, ("<tool_call>",)),  # cannot be written as text
        (_changed(HERMES, "m.role == 'tool'", "m.role == 'other'"), ()),  # does not show results
        (_changed(HERMES, "call.function.name +", "call.id + call.function.name +"), ()),
        (_changed(HERMES, "arguments | tojson", "arguments"), ()),  # not written as JSON
        ("{{ raise_exception('no tools here') }}", ()),
    ],
)
def test_other_templates_get_our_own_format(template: str, control_tokens: tuple[str, ...]) -> None:
    assert learnt(template, control_tokens=control_tokens) == OWN


def call_of(name: str, arguments: dict[str, Any]) -> Message:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_template_without_tools_is_told_them_in_messages() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call_of("add", {"a": 1}), call_of("now", {})]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
        {"role": "user", "content": "So?"},
    ]
    told = plain(messages, [tool("add", ADD)])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n# Tools")
    assert json.dumps(tool("add", ADD)) in told[0]["content"]
    assert told[2]["content"] == OWN.written([("add", '{"a": 1}'), ("now", "{}")])
    assert told[3]["content"] == "<tool_response>\n2\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    assert plain([{"role": "user", "content": "x"}], [tool("now")])[0]["role"] == "system"
    assert all("of_tools" not in message for message in told)
    assert messages[2]["content"] is None


FORMATS = pytest.mark.parametrize("form", [OWN, learnt(LIST), learnt(TAGGED)])


def calls_in(ids: list[int], form: ToolFormat) -> list[tuple[str, Any]]:
    parser = CallParser(form)
    begun, args = [], ""
    for event in [*parser.push(str(tiny_tokenizer().decode(ids))), *parser.flush()]:
        match event:
            case CallBegun(_, name):
                begun.append(name)
                args += "\n"
            case CallArguments(_, piece):
                args += piece.replace("\n", " ")
    return list(zip(begun, map(json.loads, args.split("\n")[1:]), strict=True))


@FORMATS
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_drawn_are_calls(form: ToolFormat, seed: int) -> None:
    grammar = grammar_of_calls(options(choice="required"), form, max_bytes=2**16)
    *ids, last = drawn(compiled(grammar), seed=seed)
    calls = calls_in(ids, form)
    assert last == END
    assert 1 <= len(calls) <= 16
    for name, arguments in calls:
        assert arguments == {} if name == "now" else set(arguments) == {"a", "b"}


@FORMATS
def test_a_call_begun_by_choice_is_finished_as_one(form: ToolFormat) -> None:
    grammar = grammar_of_calls(options(parallel=False), form, max_bytes=2**16)
    ids = drawn(compiled(grammar, trigger=form.trigger), seed=2, told=words("Well. " + form.trigger))
    assert len(calls_in(ids[:-1], form)) == 1
    assert ids[-1] == END


def test_a_named_tool_is_called_once() -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    grammar = grammar_of_calls(options(choice=choice), OWN, max_bytes=2**16)
    assert [calls_in(drawn(compiled(grammar), seed=seed)[:-1], OWN) for seed in range(5)] == [[("now", {})]] * 5


def test_what_is_not_strict_may_hold_what_cannot_be_enforced() -> None:
    odd = {"type": "object", "not": {}, "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    lax = options(tools=(tool("f", odd),), choice="required")
    assert calls_in(drawn(compiled(grammar_of_calls(lax, OWN, max_bytes=2**16)), seed=1)[:-1], OWN)[0][0] == "f"
    strict = options(tools=(tool("f", odd, strict=True),), choice="required")
    with pytest.raises(GrammarError, match="not"):
        compiled(grammar_of_calls(strict, OWN, max_bytes=2**16))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": (tool("a"), tool("b"), tool("a"))}, "tools[2].function.name"),
        ({"tools": (), "choice": "required"}, "tool_choice"),
        ({"choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice.function.name"),
    ],
)
def test_tools_that_do_not_fit_together_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        options(**fields)
    assert refused.value.param == param


def compiled(grammar: str, *, trigger: str = "") -> Any:
    return Grammars(tiny_tokenizer().backend_tokenizer, end_ids=[END]).compile_now(grammar, trigger=trigger)
