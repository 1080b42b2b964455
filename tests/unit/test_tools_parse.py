"""Calls read out of text, however it is cut."""

import pytest

from odmoe_server.openai.tools_format import OWN, ToolFormat
from odmoe_server.openai.tools_parse import CallArguments, CallBegun, CallParser, Said

CALL = OWN.written([("add", '{"a": "}\\"{", "b": [1]}')])
BARE = ToolFormat(begin="<call ", middle=">", between="</call><call ", end="</call>", native=True)


def parse(text: str, *, size: int, form: ToolFormat = OWN) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer that comes in pieces of so many characters."""
    parser = CallParser(form)
    said, calls = "", []
    events = [event for at in range(0, len(text), size) for event in parser.push(text[at : at + size])]
    for event in [*events, *parser.flush()]:
        match event:
            case Said(piece):
                said += piece
            case CallBegun(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, piece):
                calls[index] = (calls[index][0], calls[index][1] + piece)
    assert parser.num_calls == len(calls)
    return said, calls


SIZES = pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])


@SIZES
@pytest.mark.parametrize("form", [OWN, BARE])
def test_text_and_several_calls(size: int, form: ToolFormat) -> None:
    calls = [("add", '{"a": {"b": "}"}}'), ("now", "{}")]
    assert parse("Let me see.\n\n" + form.written(calls), size=size, form=form) == ("Let me see.", calls)


@SIZES
def test_brackets_in_strings_end_nothing(size: int) -> None:
    assert parse(CALL, size=size) == ("", [("add", '{"a": "}\\"{", "b": [1]}')])


@SIZES
@pytest.mark.parametrize("text", ["plain", "a <tool_call> b", "a <tool", "  \n", "x <tool_call>\n{'name'", ""])
def test_what_is_no_call_is_text(size: int, text: str) -> None:
    assert parse(text, size=size) == (text, [])


@SIZES
def test_an_answer_that_is_cut_off_keeps_what_there_is(size: int) -> None:
    cut = CALL.index('"b"')
    assert parse(CALL[:cut], size=size) == ("", [("add", '{"a": "}\\"{", ')])
    assert parse(CALL[:-4], size=size) == ("", [("add", '{"a": "}\\"{", "b": [1]}')])
    assert parse(OWN.begin + "ad", size=size) == (OWN.begin + "ad", [])


@SIZES
def test_text_behind_calls_is_text(size: int) -> None:
    assert parse(CALL + " Done.", size=size)[0] == " Done."
    assert parse(CALL + "\n" + CALL, size=size) == ("", parse(CALL, size=9)[1] * 2)


def test_nothing_is_held_that_can_be_shown() -> None:
    parser = CallParser(OWN)
    assert parser.push("Hello <to") == [Said("Hello")]
    assert parser.push("day") == [Said(" <today")]
    assert parser.push(OWN.begin + 'add", "arguments": {"a"') == [CallBegun(0, "add"), CallArguments(0, '{"a"')]
    assert parser.push(": 1}") == [CallArguments(0, ": 1}")]
