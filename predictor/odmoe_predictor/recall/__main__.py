"""`python -m odmoe_predictor.recall`: options and exit codes. The rest is imported when the options are good."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, get_args

from rich.console import Console

from odmoe_predictor.config import Precision, Scope
from odmoe_predictor.recall.plan import PREDICTORS
from odmoe_predictor.recall.questions import HELD_OUT

PROG: Final = "python -m odmoe_predictor.recall"
TOKENS: Final = 256
QUICK_PROMPTS: Final = 16
QUICK_TOKENS: Final = 48


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the file; ends the process with status 1 when it cannot, with 2 on bad options."""
    options = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        _run(options, console)
    except KeyboardInterrupt:
        sys.exit(f"{PROG}: interrupted; {options.json} has the rows that were done")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{PROG}: {error}")


def _run(options: argparse.Namespace, console: Console) -> None:
    # Takes seconds to import: whoever asks for help or mistypes a flag does not wait for torch.
    import torch

    from odmoe_predictor.recall.measure import Measurement, Wanted
    from odmoe_predictor.recall.meter import Meter

    torch.set_num_threads(options.threads)
    wanted = Wanted(
        store=options.store,
        file=options.json,
        prompts=options.prompts or (QUICK_PROMPTS if options.quick else len(HELD_OUT)),
        tokens=options.tokens or (QUICK_TOKENS if options.quick else TOKENS),
        quick=options.quick,
        threads=options.threads,
        seed=options.seed,
        predictors=options.predictor,
        precisions=options.precision,
        scopes=options.scope,
    )
    measurement = Measurement(wanted)
    measurement.results.write()  # a place that cannot be written to is found out now
    with Meter(measurement.weights, console=console) as meter:
        measurement.run(meter)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG, description="Recall of the shadow and of its rivals on held-out questions, into a JSON file."
    )
    parser.add_argument("--store", required=True, type=Path, metavar="DIR", help="prepared store (odmoe prepare)")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="written anew after each row")
    parser.add_argument("--quick", action="store_true", help="fewer questions, tokens and settings: minutes")
    parser.add_argument(
        "--prompts",
        type=_count(len(HELD_OUT)),
        metavar="N",
        help=f"questions (default: {len(HELD_OUT)}, quick {QUICK_PROMPTS})",
    )
    parser.add_argument(
        "--tokens",
        type=_count(1 << 20),
        metavar="N",
        help=f"of each answer, at most (default: {TOKENS}, quick {QUICK_TOKENS})",
    )
    parser.add_argument("--threads", type=_count(1024), default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn or trained; %(default)s")
    for flag, choices in (
        ("--predictor", PREDICTORS),
        ("--precision", get_args(Precision)),
        ("--scope", get_args(Scope)),
    ):
        parser.add_argument(flag, nargs="+", choices=choices, default=choices, help="these only (default: all)")
    return parser


def _count(most: int) -> Callable[[str], int]:
    def positive(text: str) -> int:
        number = int(text)
        if not 1 <= number <= most:
            raise argparse.ArgumentTypeError(f"must be 1 to {most}, not {number}")
        return number

    return positive


if __name__ == "__main__":
    main()
