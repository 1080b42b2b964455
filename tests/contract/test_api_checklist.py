"""deploy/openai-api.md against the server: every field it knows is on the page, and what is said of it is true."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from odmoe_server.anthropic.schemas import FIELDS as ANTHROPIC_FIELDS
from odmoe_server.anthropic.schemas import MessagesRequest
from odmoe_server.openai.errors import TABLE
from odmoe_server.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, MESSAGE_FIELDS, STREAM_OPTION_FIELDS
from odmoe_server.openai.forms import STRUCTURED_FIELDS
from odmoe_server.openai.responses_schemas import FIELDS as RESPONSES_FIELDS
from odmoe_server.openai.responses_schemas import ResponsesRequest
from odmoe_server.openai.schemas import ChatRequest, CompletionRequest
from support.http_app import CHAT, MODEL, app_of, asking, request
from support.scripted_engine import ScriptedEngine

PAGE = (Path(__file__).parents[2] / "deploy" / "openai-api.md").read_text("utf-8")
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"^\|(.+?)\|(.+?)\|(.*)\|$", section, flags=re.MULTILINE)[2:]
    for section in PAGE.split("\n## ")[1:]
}


def listed(title: str, state: str) -> set[str]:
    """What a table has in backquotes in its first column, in rows of that state."""
    return {name for what, said, _ in SECTIONS[title] if said.strip() == state for name in re.findall(r"`(.+?)`", what)}


BOTH = set(CHAT_FIELDS) & set(COMPLETION_FIELDS)


def test_every_row_has_one_of_three_states() -> None:
    for title, rows in SECTIONS.items():
        if title not in ("Errors", "Not there"):
            assert {said.strip() for _, said, _ in rows} <= {"done", "refused by name", "not applicable"}, title


def test_every_field_that_is_taken_is_on_the_page() -> None:
    done = listed("Fields of chat and text completions", "done")
    assert done == set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)


@pytest.mark.parametrize(
    ("title", "model"), [("Fields of responses", ResponsesRequest), ("Fields of Anthropic's messages", MessagesRequest)]
)
def test_every_field_of_the_other_apis_that_is_taken_is_on_the_page(title: str, model: type[BaseModel]) -> None:
    of_the_body = {name for name in listed(title, "done") if "/" not in name}
    assert of_the_body == set(model.model_fields)


@pytest.mark.parametrize(
    ("title", "fields"),
    [
        ("Refused in chat completions", set(CHAT_FIELDS) - BOTH),
        ("Refused in text completions", set(COMPLETION_FIELDS) - BOTH),
        ("Refused in both", BOTH),
        ("Refused in `structured_outputs`", set(STRUCTURED_FIELDS) - {"disable_fallback"}),
        ("Refused in `stream_options`", set(STREAM_OPTION_FIELDS)),
        ("Refused in messages", set(MESSAGE_FIELDS)),
        ("Refused in responses", set(RESPONSES_FIELDS)),
        ("Refused in Anthropic's messages", set(ANTHROPIC_FIELDS)),
    ],
)
def test_every_field_that_is_refused_is_on_the_page(title: str, fields: set[str]) -> None:
    assert listed(title, "refused by name") == fields


def refusal(path: str, body: object) -> tuple[int, str]:
    answer = request(app_of(ScriptedEngine.saying("must not be asked")), "POST", path, json=body)
    return answer.status_code, str(answer.json()["error"]["param"])


@pytest.mark.parametrize("field", sorted(listed("Refused in both", "refused by name")))
def test_what_the_page_calls_refused_is_refused(field: str) -> None:
    asks = {field: {"some": "thing"}}
    assert refusal(CHAT, asking(**asks)) == (400, field)
    assert refusal("/v1/completions", {"model": MODEL, "prompt": "a", **asks}) == (400, field)


@pytest.mark.parametrize("field", sorted(listed("Refused in `stream_options`", "refused by name")))
def test_refused_options_of_streams(field: str) -> None:
    assert refusal(CHAT, asking(stream=True, stream_options={field: True})) == (400, f"stream_options.{field}")


@pytest.mark.parametrize("field", sorted(listed("Refused in `structured_outputs`", "refused by name")))
def test_refused_parts_of_structured_outputs(field: str) -> None:
    assert refusal(CHAT, asking(structured_outputs={field: "x"})) == (400, f"structured_outputs.{field}")


def test_the_routes_are_those_of_the_document() -> None:
    paths = request(app_of(ScriptedEngine()), "GET", "/openapi.json").json()["paths"]
    there = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    named = {name for name in listed("Routes", "done") if " " in name}
    assert named <= there
    assert {route for route in there if route not in named} <= NOT_OF_THE_API


# The status page of this server is no part of anybody's API.
NOT_OF_THE_API = {"GET /"}


def test_the_statuses_are_those_of_the_table() -> None:
    told = {int(said) for _, said, _ in re.findall(r"^\|(.+?)\| (\d+)(.*)\|$", PAGE, flags=re.MULTILINE)}
    assert told == {row.status for row in TABLE.values() if row.status not in (405, 408)}
