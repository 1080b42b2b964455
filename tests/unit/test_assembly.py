"""Which tokens each piece of text is made of: none lost, none twice, in order, however the text is held back."""

from hypothesis import given
from hypothesis import strategies as st

from odmoe_server.assembly import Assembler, Piece
from odmoe_server.engine_api import Token
from odmoe_server.stops import StopFilter
from odmoe_server.text import TextCodec
from support.scripted_engine import tiny_tokenizer, words

CODEC = TextCodec(tiny_tokenizer())


def pieces(
    ids: list[int], stops: list[str] | None = None, *, include: bool = False, min_tokens: int = 0
) -> list[Piece]:
    assembler = Assembler(
        CODEC.detokeniser(), StopFilter(stops or [], include=include), min_tokens=min_tokens, with_tokens=True
    )
    found = []
    for number, token_id in enumerate(ids):
        # The log probability tells tokens of one id apart.
        found.append(assembler.push(Token(token_id, logprob=-float(number))))
        if assembler.stopped_by is not None:
            break
    else:
        found.append(assembler.flush())
    return [piece for piece in found if piece is not None]


def test_tokens_of_one_character_come_with_it() -> None:
    assert [(piece.text, len(piece.tokens)) for piece in pieces(words("aé🏔"))] == [("a", 1), ("é", 2), ("🏔", 4)]


def test_tokens_held_back_for_a_stop_string_come_when_it_is_none() -> None:
    assert [(piece.text, len(piece.tokens)) for piece in pieces(words("aENx"), ["END"])] == [("a", 1), ("ENx", 3)]
    assert [(piece.text, len(piece.tokens)) for piece in pieces(words("aEN"), ["END"])] == [("a", 1), ("EN", 2)]


def test_the_tokens_of_a_stop_string_are_not_shown() -> None:
    assert [(piece.text, len(piece.tokens)) for piece in pieces(words("aEND"), ["END"])] == [("a", 1)]
    assert [(p.text, len(p.tokens)) for p in pieces(words("aEND"), ["END"], include=True)] == [("a", 1), ("END", 3)]


def test_before_min_tokens_no_stop_string_is_seen() -> None:
    assert "".join(piece.text for piece in pieces(words("a.b.c"), ["."], min_tokens=2)) == "a.b"


@given(
    ids=st.lists(st.integers(0, 255), max_size=40), stops=st.lists(st.text("abc", min_size=1, max_size=3), max_size=2)
)
def test_every_shown_token_once_and_in_order(ids: list[int], stops: list[str]) -> None:
    found = pieces(ids, stops)
    numbers = [-token.logprob for piece in found for token in piece.tokens if token.logprob is not None]
    assert numbers == list(range(len(numbers)))
    text = "".join(piece.text for piece in found)
    if not any(stop in tiny_tokenizer().decode(ids) for stop in stops):
        assert len(numbers) == len(ids)
        assert text == tiny_tokenizer().backend_tokenizer.decode(ids, skip_special_tokens=False)


@given(st.text(max_size=20))
def test_the_bytes_of_all_tokens_are_the_text(text: str) -> None:
    assert b"".join(map(CODEC.token_bytes, words(text))) == text.encode()
