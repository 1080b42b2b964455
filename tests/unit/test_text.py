"""Text out of tokens, and text cut at stop strings: the same however it comes in pieces."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from odmoe_server.stops import StopFilter
from odmoe_server.text import MAX_HELD_TOKENS, Detokeniser, TextCodec, TextError
from support.scripted_engine import tiny_tokenizer, words

BYTES = tiny_tokenizer().backend_tokenizer


def pieces(ids: list[int], tokenizer: Tokenizer = BYTES) -> list[str]:
    """What a detokeniser shows for each token, and at the end."""
    detokeniser = Detokeniser(tokenizer)
    return [*(detokeniser.push(token_id) for token_id in ids), detokeniser.flush()]


def test_each_character_is_shown_when_it_is_complete() -> None:
    assert pieces(words("aé🏔b")) == ["a", "", "é", "", "", "", "🏔", "b", ""]


@given(st.text())
def test_all_pieces_are_the_whole_text(text: str) -> None:
    assert "".join(pieces(words(text))) == text


@given(st.lists(st.integers(0, 255), max_size=60))
def test_no_token_breaks_it_and_little_is_held(ids: list[int]) -> None:
    shown = pieces(ids)
    silent = 0
    for piece in shown[:-1]:
        silent = 0 if piece else silent + 1
        assert silent < MAX_HELD_TOKENS


def sentencepiece_like() -> Tokenizer:
    """As Mixtral's: a mark for spaces, bytes as tokens of their own, the first space stripped."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁Hi": 256, "▁you": 257, "<unk>": 258, "!": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    strip = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_spaces_between_words_are_kept_and_the_first_is_not() -> None:
    mountain = list("🏔".encode())
    assert "".join(pieces([256, 257, *mountain, 257, 259], sentencepiece_like())) == "Hi you🏔 you!"


@given(st.lists(st.integers(0, 259), max_size=60))
def test_random_bytes_between_words_break_nothing(ids: list[int]) -> None:
    pieces(ids, sentencepiece_like())


def test_special_tokens_are_left_out_without_losing_a_space() -> None:
    tokenizer = sentencepiece_like()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    end_id = tokenizer.token_to_id("<end>")
    detokeniser = Detokeniser(tokenizer, special_ids=frozenset({end_id}))
    assert [detokeniser.push(i) for i in (256, end_id, end_id, 257)] == ["Hi", "", "", " you"]


def test_a_long_answer_does_not_get_slower() -> None:
    detokeniser = Detokeniser(BYTES)
    for token_id in words("word " * 200):
        detokeniser.push(token_id)
        assert len(detokeniser._ids) <= 2


# ----------------------------------------------------------------------------------------------------- stop strings


def shown(text: str, stops: list[str], *, cuts: list[int]) -> str:
    """What a filter lets through of a text that is cut at these places."""
    stop_filter = StopFilter(stops)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    let_through = [stop_filter.push(text[a:b]) for a, b in itertools.pairwise(places)]
    return "".join(let_through) + stop_filter.flush()


TEXT = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_it_does_not_matter_where_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    assert shown(text, stops, cuts=cuts) == shown(text, stops, cuts=list(range(len(text))))


@given(text=TEXT, stops=STOPS)
def test_text_ends_at_the_stop_that_is_complete_first(text: str, stops: list[str]) -> None:
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            assert shown(text, stops, cuts=[]) == text[: end - len(max(done, key=len))]
            return
    assert shown(text, stops, cuts=[]) == text


@given(text=TEXT, stops=STOPS)
def test_nothing_shown_has_to_be_taken_back(text: str, stops: list[str]) -> None:
    final = shown(text, stops, cuts=[])
    stop_filter = StopFilter(stops)
    so_far = ""
    for letter in text:
        so_far += stop_filter.push(letter)
        assert final.startswith(so_far)


def test_only_what_could_become_a_stop_is_held() -> None:
    stop_filter = StopFilter(["STOP"])
    assert [stop_filter.push(letter) for letter in "aSTxS"] == ["a", "", "", "STx", ""]
    assert stop_filter.flush() == "S"


def test_nothing_comes_after_a_stop() -> None:
    stop_filter = StopFilter(["x"])
    assert stop_filter.push("axb") == "a"
    assert stop_filter.stopped
    assert stop_filter.push("more") == ""
    assert stop_filter.flush() == ""


# ----------------------------------------------------------------------------------------------------------- prompts


def test_a_model_without_a_template_cannot_chat() -> None:
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=BYTES)
    codec = TextCodec(tokenizer)
    assert not codec.can_chat
    with pytest.raises(TextError, match="no chat template"):
        asyncio.run(codec.prompt_ids([{"role": "user", "content": "x"}]))


def test_prompts_made_at_once_do_not_mix() -> None:
    codec = TextCodec(tiny_tokenizer())

    async def scenario() -> None:
        texts = [str(i) * 200 for i in range(10)]
        prompts = await asyncio.gather(*(codec.prompt_ids([{"role": "user", "content": text}]) for text in texts))
        for text, ids in zip(texts, prompts, strict=True):
            assert text in tiny_tokenizer().decode(ids)

    asyncio.run(scenario())
