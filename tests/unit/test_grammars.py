"""Constraints as the engine calls them, over a vocabulary of bytes and answers drawn by chance."""

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

import pytest
import torch

from odmoe_server.engine_api import GenerationFailed
from odmoe_server.grammars import GrammarConstraint, GrammarError, Grammars
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.structured import grammar_of_schema
from support.drawn_answers import END, drawn
from support.scripted_engine import tiny_tokenizer, words

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TWO_DIGITS = "%llguidance {}\nstart: /[0-9]{2}/\n"


def grammars() -> Grammars:
    return Grammars(tiny_tokenizer().backend_tokenizer, end_ids=[END])


def of_schema(schema: dict[str, Any]) -> GrammarConstraint:
    return grammars().compile_now(grammar_of_schema(schema, param="schema", max_bytes=2**16))


def text_of_ids(ids: list[int]) -> str:
    return str(tiny_tokenizer().decode(ids))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drawn_follows_the_schema(seed: int) -> None:
    *ids, last = drawn(of_schema(PERSON), seed=seed)
    person = json.loads(text_of_ids(ids))
    assert last == END
    assert set(person) == {"name", "age"}
    assert 0 <= person["age"] <= 130
    assert len(person["name"]) <= 8


def test_no_other_key_where_none_is_allowed() -> None:
    *ids, _ = drawn(of_schema({"type": "object", "additionalProperties": False}), seed=1)
    assert json.loads(text_of_ids(ids)) == {}


def test_the_end_token_comes_exactly_where_the_answer_may_end() -> None:
    ids = drawn(grammars().compile_now(TWO_DIGITS), seed=3)
    assert len(ids) == 3
    assert text_of_ids(ids[:2]).isdecimal()
    assert ids[2] == END


def test_sequences_of_one_constraint_do_not_meet() -> None:
    constraint = grammars().compile_now(TWO_DIGITS)
    first, second = constraint.start(), constraint.start()
    scores_V = torch.zeros(len(tiny_tokenizer()))
    first([], scores_V)
    one = words("7")
    first(one, scores_V)
    first([*one, *words("8")], scores_V)
    allowed_V = second([], scores_V) == 0
    assert int(allowed_V.sum()) == 10
    assert not allowed_V[END]


def test_nothing_is_forbidden_before_the_trigger() -> None:
    constraint = grammars().compile_now(TWO_DIGITS, trigger="<go>")
    ids = drawn(constraint, seed=1, told=words("Anything <go <go>"))
    assert text_of_ids(ids[:17]) == "Anything <go <go>"
    assert text_of_ids(ids[17:19]).isdecimal()
    assert ids[19:] == [END]


def test_a_trigger_that_is_written_on_otherwise_is_none() -> None:
    plain = tiny_tokenizer().backend_tokenizer
    assert plain.token_to_id(">") is not None
    allow = grammars().compile_now(TWO_DIGITS, trigger="go").start()
    scores_V = torch.zeros(len(tiny_tokenizer()))
    ids: list[int] = []
    for token in words("go4"):
        ids.append(token)
        allow(list(ids), scores_V)
    assert int((allow([*ids, *words("2")], scores_V) == 0).sum()) == 1  # the end token


def test_padding_of_the_vocabulary_is_never_allowed() -> None:
    allow = grammars().compile_now("%llguidance {}\nstart: /.*/\n").start()
    scores_V = allow([], torch.zeros(len(tiny_tokenizer()) + 5))
    assert bool(scores_V[-5:].isneginf().all())
    assert not bool(scores_V[:-5].isneginf().all())


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "strin"}, "strin"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "https://example.com/schema"}, "retriev"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "string", "minLength": 9, "maxLength": 2}, "minLength"),
        ({"enum": []}, "empty"),
        ({"$ref": "#"}, "nothing follows"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
    ],
)
def test_what_cannot_be_enforced_is_refused(schema: dict[str, Any], word: str) -> None:
    with pytest.raises(GrammarError, match=word):
        of_schema(schema)


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "object", "description": "x" * 200_000}, "larger than"),
        ({"enum": ["x" * 5000]}, "value longer"),
        ({"anyOf": [{"const": {"a": "x" * 5000}}]}, "value longer"),
        ({"type": "string", "pattern": "x" * 5000}, "value longer"),
    ],
)
def test_a_schema_has_a_largest_size(schema: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        grammar_of_schema(schema, param="schema", max_bytes=2**16)


def test_a_complaint_is_one_line() -> None:
    with pytest.raises(GrammarError) as refused:
        of_schema({"type": "object", "not": {}})
    assert str(refused.value) == 'Unimplemented keys: ["not"]'


def test_a_schema_has_a_greatest_depth() -> None:
    schema: dict[str, Any] = {}
    for _ in range(40):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InvalidRequest, match="levels deep"):
        grammar_of_schema(schema, param="schema", max_bytes=2**16)


@pytest.mark.parametrize(
    "pattern", ["((a{1,50}b{1,50}){1,50}c{1,50}){1,50}", "(.{0,500}x.{0,500}y){0,100}", "((a|b|c)*d.{200}){1,100}e"]
)
def test_a_grammar_made_to_hurt_costs_little(pattern: str) -> None:
    started_s = time.process_time()
    with suppress(GrammarError, GenerationFailed):
        drawn(of_schema({"type": "string", "pattern": f"^{pattern}$"}), seed=1, most=50)
    assert time.process_time() - started_s < 5


def test_compiling_leaves_the_event_loop_free() -> None:
    async def scenario() -> None:
        schema = {"anyOf": [{"properties": {f"p{i}": {"enum": list(range(50))}}} for i in range(200)]}
        source = grammar_of_schema(schema, param="schema", max_bytes=2**16)
        compiling = asyncio.ensure_future(grammars().compile(source))
        turns = 0
        while not compiling.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 2
        compiling.result()

    asyncio.run(scenario())


def test_a_model_without_an_end_is_told_so() -> None:
    with pytest.raises(GrammarError, match="no token that ends"):
        Grammars(tiny_tokenizer().backend_tokenizer, end_ids=[]).compile_now(TWO_DIGITS)
