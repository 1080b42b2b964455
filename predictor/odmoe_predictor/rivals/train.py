"""`odmoe train-predictor`: a trained rival from recorded traces. Knows options and files; the work is in `fitting`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

PROG: Final = "odmoe train-predictor"
HELD_OUT: Final = 0.1


def main(argv: Sequence[str] | None = None) -> None:
    """Train and write the file; ends the process with status 1 when a file cannot be used, with 2 on bad options."""
    options = _parser().parse_args(argv)
    try:
        _run(options, Console(stderr=True))
    except (ValueError, OSError) as error:
        sys.exit(f"{PROG}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{PROG}: interrupted")
    print(options.out)


def _run(options: argparse.Namespace, console: Console) -> None:
    # Takes seconds to import: whoever asks for help or mistypes a flag does not wait for torch.
    import torch

    from odmoe_predictor.rivals import fitting, weights
    from odmoe_predictor.rivals.trained import ExpertScores

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokens, header = fitting.read(options.traces)
    shape = fitting.shape_of(header)
    if options.look_ahead > shape.num_layers:
        raise ValueError(f"--look-ahead {options.look_ahead}: the model has {shape.num_layers} MoE layers")
    if options.width > weights.MAX_WIDTH:
        raise ValueError(f"--width {options.width}: at most {weights.MAX_WIDTH}")
    if not os.access(options.out.parent, os.W_OK):
        raise ValueError(f"--out {options.out}: its directory is not there or cannot be written to")
    seen, held_out = tokens.split(HELD_OUT)
    console.print(f"{len(seen)} tokens to learn from, {len(held_out)} held out, {shape}")
    model = ExpertScores(shape, look_ahead=options.look_ahead, width=options.width)
    fitting.fit(model, seen, epochs=options.epochs, console=console)
    console.print(
        f"recall on the tokens held out: {fitting.recall(model, held_out):.4f}; "
        f"of the most frequent experts: {fitting.recall_of_the_most_frequent(seen, held_out, shape):.4f}"
    )
    weights.save(model, options.out, store_digest=header.store_digest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="Train a predictor on traces (odmoe serve --trace).")
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="files that --trace wrote, of one model")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="safetensors file to write")
    parser.add_argument(
        "--look-ahead",
        type=_positive,
        default=1,
        metavar="N",
        help="forecast a layer when the one so many before it is routed (default: %(default)s)",
    )
    parser.add_argument("--width", type=_positive, default=128, metavar="N", help="of the model (default: %(default)s)")
    parser.add_argument("--epochs", type=_positive, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="default: %(default)s")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


if __name__ == "__main__":
    main()
