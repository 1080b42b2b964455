"""`odmoe status`: the page's figures on a terminal. Knows the feed and rich; nothing of how the figures come about."""

from collections.abc import Iterator

import httpx
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from odmoe_server.status.feed import NodeLine, Status

# The feed speaks twice a second.
SILENCE_S = 10.0
MOST_CELLS = 32
NOTHING_YET = "-"
STORY_SHOWN = 5
# What peers say must not move the cursor or set the window's title.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])


class StatusError(ValueError):
    """There is nothing to show; the text says why."""


def follow(url: str, *, api_key: str | None) -> Iterator[Status]:
    """The pictures of a server as they come, until it ends the stream. Raises StatusError."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    address = f"{url.rstrip('/')}/status/events"
    try:
        with httpx.stream("GET", address, headers=headers, timeout=SILENCE_S) as answer:
            if answer.status_code == httpx.codes.UNAUTHORIZED:
                raise StatusError(f"{url} wants another API key (--api-key or ODMOE_API_KEY)")
            if answer.status_code != httpx.codes.OK:
                raise StatusError(f"{address} answered {answer.status_code}: is it an odmoe server?")
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield _status(line.removeprefix("data: "))
    except httpx.UnsupportedProtocol:
        raise StatusError("--url begins with http:// or https://, such as http://127.0.0.1:8000") from None
    except httpx.HTTPError as error:
        raise StatusError(f"no answer from {url} ({error}); start a server: odmoe serve, or name one: --url") from error


def _status(text: str) -> Status:
    try:
        return msgspec.json.decode(text, type=Status)
    except msgspec.ValidationError as error:
        raise StatusError(f"the server is of another version than this command: {error}") from error
    except msgspec.DecodeError as error:
        raise StatusError(f"the server said something that is no status: {error}") from error


def show(url: str, *, api_key: str | None, once: bool, as_json: bool, console: Console) -> None:
    """Until the server or the user ends it; with `once`, and into a pipe or a file, where nobody would end it, one
    picture that has rates in it. Raises StatusError."""
    pictures = follow(url, api_key=api_key)
    if once or as_json or not console.is_terminal:
        next(pictures, None)  # the first has no rates yet
        status = next(pictures, None)
        if status is None:
            raise StatusError("the server is shutting down")
        if as_json:
            console.print_json(msgspec.json.encode(status).decode())
        else:
            console.print(screen(status))
        return
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        for status in pictures:
            live.update(screen(status), refresh=True)


def screen(status: Status) -> RenderableType:
    """One picture."""
    return Group(_headline(status), Text(), _figures(status), Text(), _peers(status), Text(), *_story(status))


def _headline(status: Status) -> Text:
    colour = {"ready": "green", "dead": "red"}.get(status.state, "yellow")
    word = status.state if status.state == "ready" else f"{status.state}: {status.detail}"
    return Text.assemble(("odmoe ", "bold"), (status.model, "cyan"), "  ", (f"● {word}", colour))


def _figures(status: Status) -> Table:
    found = status.hit + status.late + status.missed
    recall = status.recall if status.recall_lately is None else status.recall_lately
    figures = {
        "tokens a second": f"{status.tokens_per_s:.1f}",
        "running / waiting": f"{status.running} / {status.queued}",
        "forecast recall": _percent(recall),
        "found in a slot": _percent(status.hit / found if found else None),
        "stall a token": _time(status.stall_s_per_token),
        "time of a load": _time(status.load_s),
        "loads a second": f"{status.loads_per_s:.1f}",
        "shadow is ahead": NOTHING_YET if status.lead_layers is None else f"{status.lead_layers} layers",
        "drafts accepted": _percent(status.accepted / status.drafted if status.drafted else None),
        "failovers": str(status.failovers),
    }
    if status.kv_budget_bytes:
        figures["KV cache"] = f"{status.kv_bytes / 1e6:.0f} of {status.kv_budget_bytes / 1e6:.0f} MB"
    grid = Table.grid(padding=(0, 3))
    cells = [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in figures.items()]
    for i in range(0, len(cells), 3):
        grid.add_row(*cells[i : i + 3])
    return grid


def _peers(status: Status) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "node", "slots"):
        table.add_column(column)
    for column in ("used", "loads/s", "a load", "answer", "memory"):
        table.add_column(column, justify="right")
    for node in status.nodes:
        dot = Text("●", "green" if node.alive else "red")
        if node.role == "predictor":
            table.add_row(dot, node.id, Text(f"{node.forecasts_per_s:.0f} forecasts a second", "dim"))
        else:
            table.add_row(dot, node.id, _cells(node), *_node_figures(node), style="" if node.alive else "dim")
    return table


def _node_figures(node: NodeLine) -> tuple[str, ...]:
    if not node.alive:
        return ("gone",)
    used, memory = f"{node.used_slots}/{node.slots}", f"{node.rss_bytes / 1e6:.0f} MB"
    return used, f"{node.loads_per_s:.1f}", _time(node.load_s), _time(node.rpc_s), memory


def _cells(node: NodeLine) -> Text:
    shown = min(node.slots, MOST_CELLS)
    full = round(node.used_slots / node.slots * shown) if node.slots else 0
    return Text.assemble(("■" * full, "green"), ("□" * (shown - full), "dim"))


def _story(status: Status) -> list[Text]:
    lately = status.story[: -STORY_SHOWN - 1 : -1]
    return [Text.assemble((f"{line.ago_s:6.0f} s ago  ", "dim"), line.text.translate(_CONTROLS)) for line in lately]


def _percent(share: float | None) -> str:
    return NOTHING_YET if share is None else f"{100 * share:.1f} %"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING_YET
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
