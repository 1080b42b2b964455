"""The command `odmoe-node`: settings, signals, one agent until it is told to stop. The only place with signals."""

import signal
import sys

import torch
from rich.console import Console

from odmoe_node.build import build_agent
from odmoe_node.config import NodeSettings
from odmoe_node.driver import RefusedError
from odmoe_node.identity import DefaultName
from odmoe_wire import endpoints, logs
from odmoe_wire.lifeline import end_with_parent, settle_heap
from odmoe_wire.settings import parse, table

EXIT_FAILED = 1


def main(argv: list[str] | None = None) -> int:
    """Run one node agent; returns the exit status."""
    settings = parse(NodeSettings, sys.argv[1:] if argv is None else argv, prog="odmoe-node")
    if settings.exit_with_parent:
        end_with_parent(signal.SIGTERM)
    logs.configure(settings.log_level, settings.log_format, role=settings.node_id or "node")
    torch.set_num_threads(settings.threads)
    Console().print(table(settings, title="odmoe-node"))
    try:
        return _run(settings)
    except (ValueError, RefusedError) as error:
        print(f"odmoe-node: {error}", file=sys.stderr)
        return EXIT_FAILED


def _run(settings: NodeSettings) -> int:
    default = None if settings.node_id else DefaultName(settings.store)
    node_id = settings.node_id or (default.name if default else "")
    context = endpoints.context(num_links=2)
    try:
        agent = build_agent(settings, node_id=node_id, context=context)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stop_soon())
        settle_heap()
        agent.run()
    finally:
        context.destroy(linger=0)
        if default is not None:
            default.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
