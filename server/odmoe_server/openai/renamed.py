"""Complaints about a request that was made out of another, in the words of the other. Knows the error table's kinds."""

from collections.abc import Mapping

from odmoe_server.openai.errors import RequestError


def renamed(error: RequestError, fields: Mapping[str, str]) -> RequestError:
    """The same complaint, with the names of fields as the client knows them. Longer names come before their parts."""
    message, param = str(error), error.param
    for theirs, ours in fields.items():
        message = message.replace(f"{theirs}'", f"{ours}'")
        param = None if param is None else _replaced(param, theirs, ours)
    return type(error)(message, param=param)


def _replaced(param: str, theirs: str, ours: str) -> str:
    """Whole names only."""
    before, found, after = param.partition(theirs)
    is_whole = found and (not before or before.endswith(".")) and (not after or after[0] in ".[")
    return before + ours + after if is_whole else param
