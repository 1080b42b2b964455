"""`odmoe-predictor`: settings, signals and exit codes. The rest is imported when the settings are good."""

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Final

from odmoe_predictor.config import PredictorSettings
from odmoe_wire import logs
from odmoe_wire.lifeline import end_with_parent
from odmoe_wire.settings import parse

PROG: Final = "odmoe-predictor"
log = logging.getLogger(PROG)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a predictor until SIGINT or SIGTERM; ends the process with status 1 when it cannot."""
    settings = parse(PredictorSettings, sys.argv[1:] if argv is None else argv, prog=PROG)
    logs.configure(settings.log_level, settings.log_format, role=settings.peer_id)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if settings.exit_with_parent:
        end_with_parent(signal.SIGTERM)
    try:
        _run(settings)
    except KeyboardInterrupt:
        log.info("stopped")


def _run(settings: PredictorSettings) -> None:
    # Takes seconds to import: whoever asks for help or mistypes a flag does not wait for torch.
    from odmoe_predictor.process import CannotRunError, run

    try:
        run(settings, title=PROG)
    except CannotRunError as error:
        sys.exit(f"{PROG}: {error}")


if __name__ == "__main__":
    main()
