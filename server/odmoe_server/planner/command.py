"""`odmoe plan`: asks the model what the settings ask, and prints the answer. Decides only what is printed."""

from pathlib import Path
from typing import Final

from rich.console import Console

from odmoe_server.planner import bench, bench_record, paper, report, search
from odmoe_server.planner.answer import Question, answer
from odmoe_server.planner.question import PlanSettings, forecast_of, machines_of, shape_of

DONE: Final = 0
OFF: Final = 1
NOT_REACHED: Final = 1


def run(settings: PlanSettings, *, console: Console) -> int:
    """The process's exit status: 1 when a figure of the paper or of a record is off, or the speed asked for cannot be
    reached. Raises ValueError with a message for the user."""
    if settings.paper:
        return _compare_with_paper(console)
    if settings.bench is not None:
        return _compare_with_bench(settings.bench, console)
    question = question_of(settings)
    console.print(report.answer_table(question, answer(question)))
    if settings.tokens_per_s is None:
        return DONE
    nodes = search.nodes_for(question, settings.tokens_per_s)
    link = search.link_for(question, settings.tokens_per_s)
    console.print(report.search_table(settings.tokens_per_s, nodes=nodes, link=link, question=question))
    return NOT_REACHED if nodes.least is None and link.least is None else DONE


def question_of(settings: PlanSettings) -> Question:
    """The question that settings ask. Raises ValueError where there is no such model."""
    shape = shape_of(settings)
    return Question(
        shape=shape,
        machines=machines_of(settings, shape=shape),
        forecast=forecast_of(settings),
        prompt_tokens=settings.prompt_tokens,
        output_tokens=settings.output_tokens,
        prefill_overlap=settings.prefill_overlap,
        prefill_chunk=settings.prefill_chunk,
        prompt_kv=settings.prompt_kv,
        seed=settings.seed,
    )


def _compare_with_paper(console: Console) -> int:
    rows = paper.compare()
    for table in report.paper_tables(rows):
        console.print(table)
    for line in (*paper.ASSUMPTIONS, paper.NOT_COMPARED):
        console.print(line)
    return OFF if any(row.off for row in rows) else DONE


def _compare_with_bench(path: Path, console: Console) -> int:
    record = bench_record.read(path)
    rows = bench.compare(record)
    for table in report.bench_tables(rows):
        console.print(table)
    for line in bench.assumptions(record):
        console.print(line)
    return OFF if any(row.off for row in rows) else DONE
