"""What is told of an answer's tokens besides their text, where it was asked for: ids, and which experts they took.

Knows the engine's events; knows no HTTP. Nothing is kept that was not asked for.

T tokens, L MoE layers, K experts a token.
"""

from typing import TYPE_CHECKING

from odmoe_server.engine_api import ReadPrompt, Token

if TYPE_CHECKING:
    from torch import Tensor


class Told:
    """Of one answer. `experts`: [T, L, K] in pieces, T being all tokens that have gone through the model so far."""

    def __init__(self, *, ids: bool) -> None:
        self._ids: list[int] | None = [] if ids else None
        self.experts: list[Tensor] = []

    def token(self, token: Token) -> None:
        """The next one, the one that ends the answer included."""
        if self._ids is not None:
            self._ids.append(token.token_id)
        self.computed(token)

    def computed(self, event: Token | ReadPrompt) -> None:
        """Which experts."""
        if event.experts_TLK is not None:
            self.experts.append(event.experts_TLK)

    def take_ids(self) -> tuple[int, ...]:
        """Those that have not been taken yet."""
        if not self._ids:
            return ()
        ids, self._ids = tuple(self._ids), []
        return ids
