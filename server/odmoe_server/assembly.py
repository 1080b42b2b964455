"""Tokens to text that may be shown, and which tokens that text is made of. Knows no engine, no HTTP and no clock."""

from collections import deque
from dataclasses import dataclass

from odmoe_server.engine_api import Token
from odmoe_server.stops import StopFilter
from odmoe_server.text import Detokeniser


@dataclass(frozen=True)
class Piece:
    """More of the answer's text; never empty, except the first one of an answer. `tokens` are those whose text is
    complete with it, where log probabilities were asked for; `num_tokens` counts the answer's so far. `prompt`: the
    prompt's own tokens, ahead of all text, where those were asked for. `ids`: those of all tokens that have come since
    the last piece, where they were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()
    num_tokens: int = 0
    prompt: tuple[Token, ...] = ()
    ids: tuple[int, ...] = ()


class Assembler:
    """Puts one answer together. Before `min_tokens` no stop string is looked for. `with_hidden`: among the tokens are
    also those without a text that is shown."""

    def __init__(
        self,
        detokeniser: Detokeniser,
        stops: StopFilter,
        *,
        min_tokens: int = 0,
        with_tokens: bool = False,
        with_hidden: bool = False,
    ) -> None:
        self._detokeniser = detokeniser
        self._stops = stops
        self._min_tokens = min_tokens
        self._spans = _Spans() if with_tokens else None
        self._with_hidden = with_hidden
        self.num_tokens = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._stops.stopped_by

    def push(self, token: Token) -> Piece | None:
        """What may be shown now; None if that is nothing new."""
        self.num_tokens += 1
        text = self._detokeniser.push(token.token_id)
        if self._spans is not None and (self._with_hidden or not self._detokeniser.hides(token.token_id)):
            self._spans.add(token, text)
        shown = text if self.num_tokens <= self._min_tokens else self._stops.push(text)
        return self._piece(shown) if shown or self.num_tokens == 1 else None

    def flush(self, end: Token | None = None) -> Piece | None:
        """What is left when no token comes any more but the one that ends the answer."""
        text = self._detokeniser.flush()
        if self._spans is not None:
            self._spans.complete(text)
            if end is not None and self._with_hidden:
                self._spans.add(end, "")
                self._spans.complete("")
        shown = self._stops.push(text) + self._stops.flush()
        tokens = self._spans.rest() if self._spans is not None and not self._stops.stopped else ()
        piece = self._piece(shown)
        return Piece(piece.text, piece.tokens + tokens, self.num_tokens) if shown or tokens else None

    def _piece(self, shown: str) -> Piece:
        tokens = () if self._spans is None else self._spans.shown(len(shown), is_last=self._stops.stopped)
        return Piece(shown, tokens, self.num_tokens)


class _Spans:
    """Which characters of the text each token is; tokens that make a character together share its span."""

    def __init__(self) -> None:
        self._pending: list[Token] = []  # of a character that is not complete
        self._held: deque[tuple[int, int, Token]] = deque()  # (start, end, token) of text that is not shown yet
        self._num_chars = 0
        self._num_shown = 0

    def add(self, token: Token, text: str) -> None:
        """A token, and the text that became certain with it."""
        self._pending.append(token)
        if text:
            self.complete(text)

    def complete(self, text: str) -> None:
        """The text of all tokens that are pending."""
        start, self._num_chars = self._num_chars, self._num_chars + len(text)
        self._held.extend((start, self._num_chars, token) for token in self._pending)
        self._pending.clear()

    def shown(self, num_chars: int, *, is_last: bool) -> tuple[Token, ...]:
        """The tokens complete with so many more characters; of the last ones, also the token that was cut."""
        self._num_shown += num_chars
        found = []
        while self._held and (self._held[0][1] <= self._num_shown or (is_last and self._held[0][0] < self._num_shown)):
            found.append(self._held.popleft()[2])
        return tuple(found)

    def rest(self) -> tuple[Token, ...]:
        """All that are left."""
        found = tuple(token for _, _, token in self._held)
        self._held.clear()
        return found
