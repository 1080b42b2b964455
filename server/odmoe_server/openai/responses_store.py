"""Responses that can be fetched, gone on from, cancelled and deleted. In memory, bounded, and lost with the process.

Knows ids, owners and sizes. Does not know what is in a response. Nobody sees what another API key made.
"""

import asyncio
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

from odmoe_server.openai.errors import InvalidRequest, UnknownResponse

MAX_STORED: Final = 512
MAX_STORED_BYTES: Final = 64 * 2**20


@dataclass(kw_only=True)
class Stored:
    """One response. `conversation`: its chat messages, with its answer once there is one; `cancelled` ends an answer
    that is being made."""

    owner: str
    body: dict[str, Any]
    conversation: list[dict[str, Any]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    num_bytes: int = 0

    @property
    def is_running(self) -> bool:
        """Whether the answer is still being made."""
        return bool(self.body["status"] == "in_progress")


class ResponseStore:
    """The newest responses. One that is too old to be kept is as unknown as one that never was."""

    def __init__(self, *, max_stored: int = MAX_STORED, max_bytes: int = MAX_STORED_BYTES) -> None:
        self._max_stored, self._max_bytes = max_stored, max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._num_bytes = 0

    def begin(self, stored: Stored) -> None:
        """A response whose answer is being made."""
        self._stored[stored.body["id"]] = stored
        self._shrink()

    def complete(self, stored: Stored) -> None:
        """Its answer is there, or broke off. One that was deleted meanwhile stays so."""
        if stored.cancelled.is_set() and stored.body["id"] not in self._stored:
            return
        self._stored[stored.body["id"]] = stored
        stored.num_bytes = len(json.dumps([stored.body, stored.conversation]))
        self._num_bytes += stored.num_bytes
        self._shrink()

    def get(self, response_id: str, *, owner: str) -> Stored:
        """Raises `UnknownResponse`."""
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner:
            raise UnknownResponse(f"Response with id '{response_id}' not found.")
        return stored

    def conversation(self, response_id: str | None, *, owner: str) -> list[dict[str, Any]]:
        """What `previous_response_id` goes on from. Raises `InvalidRequest`."""
        if response_id is None:
            return []
        try:
            stored = self.get(response_id, owner=owner)
        except UnknownResponse as error:
            message = f"Previous r{str(error)[1:]} It was not stored, is too old, or another key's."
            raise InvalidRequest(message, param="previous_response_id") from None
        if stored.body["status"] not in ("completed", "incomplete"):
            raise InvalidRequest(
                f"The response '{response_id}' has no answer to go on from: it is {stored.body['status']}.",
                param="previous_response_id",
            )
        return stored.conversation

    def delete(self, response_id: str, *, owner: str) -> None:
        """Forget it; an answer still being made is broken off. Raises `UnknownResponse`."""
        self.get(response_id, owner=owner).cancelled.set()
        self._num_bytes -= self._stored.pop(response_id).num_bytes

    def _shrink(self) -> None:
        while len(self._stored) > self._max_stored or self._num_bytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self._num_bytes -= oldest.num_bytes
