"""`odmoe bench`: its subcommands and their options. What is slow to import is imported by the one that needs it."""

import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

app = typer.Typer(help="Measure odmoe against plain transformers, and its forecasts.", no_args_is_help=True)

_OUT_HELP = "Where the record goes; else tests/bench/results of this checkout, or the current directory."


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"numbers between commas, such as 4.4,3, not {text!r}") from None
    if not all(0 < number < float("inf") for number in found):
        raise typer.BadParameter("link ratios are above 0")
    return found


def _end_properly() -> None:
    """Asked to end, end what was started, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@app.command()
def decode(
    model: Annotated[Path | None, typer.Option(help="A prepared store; else one with random weights is made.")] = None,
    quick: Annotated[bool, typer.Option(help="A smaller model, fewer variants: under five minutes.")] = False,
    names: Annotated[
        str | None, typer.Option("--variants", help="Names between commas; else all, with --quick a few.")
    ] = None,
    link_ratio: Annotated[
        str | None,
        typer.Option(help="Times a layer's computation that a load takes, between commas (4.4,3; with --quick 4.4)."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Node agents.")] = 8,
    group_size: Annotated[int, typer.Option(min=1, help="Nodes that serve a layer together.")] = 2,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each answer (64, with --quick 24).")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt that is answered.")] = 16,
    first_prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompts for the first token.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 2,
    parts: Annotated[
        bool | None,
        typer.Option(
            "--parts/--no-parts",
            help="Measure also what messages and the shadow take, for odmoe plan --bench (with --quick: no).",
            show_default=False,
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the JSON there too.")] = None,
    out: Annotated[Path | None, typer.Option(help=_OUT_HELP)] = None,
) -> None:
    """Decode speed, first token, device memory and stalls of every variant, as ratios to plain transformers."""
    from odmoe_server.bench import decode as bench
    from odmoe_server.bench import decode_record, plot_decode, plotting, record, variants, writing
    from odmoe_server.bench import model as models
    from odmoe_server.cli import one_line_errors

    _end_properly()
    console = Console(stderr=True)
    with one_line_errors():
        plotting.require()
        question = bench.Question(
            variants=variants.named(names.split(",") if names else variants.chosen(quick=quick)),
            link_ratios=_numbers(link_ratio or ("4.4" if quick else "4.4,3")),
            store=model or models.ensure(models.QUICK if quick else models.FULL, console=console),
            nodes=nodes,
            group_size=group_size,
            tokens=tokens or (24 if quick else 64),
            prompt_tokens=prompt_tokens,
            first_prompt_tokens=first_prompt_tokens,
            repeats=repeats,
            with_parts=not quick if parts is None else parts,
        )
        machine = record.this_machine()  # before this process keeps to one core
        found = bench.measure(question, console=console)
        kept = decode_record.record_of(found, machine=machine, command=record.command_text())
        directory, title = out or record.results_directory(), f"{machine.cpu}, {kept.when:%Y-%m-%d}"
        writing.write(kept, directory, draw=lambda path: plot_decode.draw(kept.rows, path, title=title), json_file=json)
    if wrong := ", ".join(sorted({row.variant for row in found.rows if not row.identical})):
        _differs(wrong)


def _differs(names: str) -> NoReturn:
    print(f"odmoe: the answers of {names} differ from transformers'; this must never be", file=sys.stderr)
    raise typer.Exit(1)


@app.command()
def recall(
    model: Annotated[str, typer.Option(help="What is forecast; as for odmoe serve.")] = "default",
    quick: Annotated[bool, typer.Option(help="Fewer prompts, shorter answers: under five minutes.")] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: draw what such a JSON file has.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the JSON there too.")] = None,
    out: Annotated[Path | None, typer.Option(help=_OUT_HELP)] = None,
) -> None:
    """How many of the experts that the gates choose had been forecast: by shadows, and by rivals of theirs."""
    from odmoe_server import launch
    from odmoe_server.bench import plot_recall, plotting, record, writing
    from odmoe_server.bench import recall as bench
    from odmoe_server.cli import one_line_errors

    _end_properly()
    with one_line_errors():
        plotting.require()
        directory = out or record.results_directory()
        if source is None:
            found = bench.measured(launch.ensure_store(model), quick=quick, directory=directory)
        else:
            found = bench.read(source)
        kept = bench.record_of(found, machine=record.this_machine(), command=record.command_text())
        title = f"{found.get('model', model)}, {kept.machine.cpu}, {kept.when:%Y-%m-%d}"
        writing.write(
            kept,
            directory,
            draw=lambda path: plot_recall.draw(kept.rows, found["curves"], path, title=title),
            json_file=json,
        )


@app.command()
def importance(
    quick: Annotated[
        bool, typer.Option(help="Less text, fewer alphas, one share of slots: under five minutes.")
    ] = False,
    replay_only: Annotated[
        bool, typer.Option("--replay-only", help="Time no server: hit rates, bytes, quality and computed times.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the JSON there too.")] = None,
    out: Annotated[Path | None, typer.Option(help=_OUT_HELP)] = None,
) -> None:
    """What substitution, score-aware slots, prefetch and the CPU's share bring and cost, beside an LRU cache."""
    from odmoe_server.bench import plotting, record, writing
    from odmoe_server.bench.importance import measure, plot
    from odmoe_server.bench.importance import record as importance_record
    from odmoe_server.cli import one_line_errors

    _end_properly()
    with one_line_errors():
        plotting.require()
        found = measure.measure(quick=quick, serve=not replay_only, console=Console(stderr=True))
        machine = record.this_machine()
        kept = importance_record.record_of(found, machine=machine, command=record.command_text())
        title = f"{machine.cpu}, {kept.when:%Y-%m-%d}"
        writing.write(
            kept,
            out or record.results_directory(),
            draw=lambda path: plot.draw(kept.rows, path, title=title),
            json_file=json,
        )
    if not found.is_exact:
        _differs("importance at alpha 0")


@app.command()
def serve(
    model: Annotated[Path | None, typer.Option(help="A prepared store; else one with random weights is made.")] = None,
    quick: Annotated[bool, typer.Option(help="A smaller model, fewer streams, short answers.")] = False,
    url: Annotated[
        str | None, typer.Option(help="Measure this server, which serves the same model, in place of one of our own.")
    ] = None,
    streams: Annotated[
        str | None, typer.Option(help="Numbers of streams, between commas (1,2,4,8,16; with --quick 1,2,4).")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each answer (32, with --quick 8).")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Answers each stream asks for.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Node agents of our own server.")] = 2,
    slots: Annotated[int | None, typer.Option(min=1, help="Experts each may hold; else twice top-k.")] = None,
    draft: Annotated[int, typer.Option(min=0, max=15, help="Guessed tokens verified in one step.")] = 0,
    names: Annotated[
        str | None, typer.Option("--variants", help="odmoe, one-by-one, batched, front, between commas; else all.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the JSON there too.")] = None,
    out: Annotated[Path | None, typer.Option(help=_OUT_HELP)] = None,
) -> None:
    """Many users at once over HTTP: tokens/s, first token, gaps and loads, beside plain transformers' behind it."""
    from odmoe_server.bench import model as models
    from odmoe_server.bench import plotting, record, serve_question, serve_record, writing
    from odmoe_server.bench import serve as bench
    from odmoe_server.cli import one_line_errors

    _end_properly()
    console = Console(stderr=True)
    with one_line_errors():
        plotting.require()
        question = serve_question.question(
            store=model or models.ensure(models.QUICK if quick else models.FULL, console=console),
            quick=quick,
            url=url,
            streams=[int(number) for number in _numbers(streams)] if streams else None,
            tokens=tokens,
            repeats=repeats,
            names=names.split(",") if names else None,
            settings={"nodes": nodes, "slots": slots, "draft": draft},
        )
        machine = record.this_machine()
        rows = bench.measure(question, console=console)
        kept = serve_record.record_of(rows, facts=question.facts(), machine=machine, command=record.command_text())
        title = f"{kept.machine.cpu}, {kept.when:%Y-%m-%d}"
        writing.write(
            kept,
            out or record.results_directory(),
            draw=lambda path: serve_record.draw(rows, path, title=title),
            json_file=json,
        )
