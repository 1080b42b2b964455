"""A benchmark's files: their names, the Markdown table, the JSON, the pictures."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from odmoe_server.bench import plot_decode, plot_recall, plotting, recall, writing
from odmoe_server.bench.decode import shadow_bytes
from odmoe_server.bench.record import Column, Machine, Record, markdown_table, this_machine, version_text
from odmoe_server.bench.shadow_time import shadow_layer_s

pytest.importorskip("matplotlib")

XEON = Machine(cpu="Intel(R) Xeon(R) Processor", cores=2, memory_gb=24.6, system="Linux 6")
COLUMNS = (Column("variant", "variant"), Column("of resident", "ratio", 3), Column("stalled, %", "stall", 1, 100))
ROWS: list[dict[str, Any]] = [
    {"variant": "resident", "ratio": 1.0, "stall": None},
    {"variant": "on-demand", "ratio": 0.7654, "stall": 0.125},
]
PNG = b"\x89PNG"


def a_record(**changes: Any) -> Record:
    told: dict[str, Any] = {"name": "decode", "title": "T", "command": "odmoe bench decode", "machine": XEON}
    when = datetime(2026, 11, 22, 17, 5, tzinfo=UTC)
    return Record(**{**told, "columns": COLUMNS, "rows": ROWS, "when": when, "version": "0.1.0", **changes})


@pytest.mark.parametrize(
    ("cpu", "slug"),
    [
        ("Intel(R) Xeon(R) Processor", "xeon-2c"),
        ("AMD EPYC 7K62 48-Core Processor", "epyc-2c"),
        ("Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", "i7-2c"),
        ("Apple M2", "m2-2c"),
        ("", "machine-2c"),
    ],
)
def test_a_machine_has_a_short_name(cpu: str, slug: str) -> None:
    assert Machine(cpu=cpu, cores=2, memory_gb=1, system="").slug == slug


def test_this_machine_is_described() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.cpu
    assert version_text()


def test_the_markdown_table_is_aligned_in_its_source() -> None:
    assert markdown_table(COLUMNS, ROWS).splitlines() == [
        "| variant   | of resident | stalled, % |",
        "| --------- | ----------: | ---------: |",
        "| resident  |       1.000 |          - |",
        "| on-demand |       0.765 |       12.5 |",
    ]


def test_the_terminal_gets_the_brief_columns() -> None:
    table = a_record(columns=[*COLUMNS, Column("long", "variant", brief=False)]).table()
    assert [column.header for column in table.columns] == ["variant", "of resident", "stalled, %"]
    assert table.row_count == len(ROWS)


def test_truth_is_told_in_words() -> None:
    column = Column("identical", "identical")
    assert [column.text({"identical": value}) for value in (True, False)] == ["yes", "NO"]


def test_files_have_name_machine_and_date(tmp_path: Path) -> None:
    paths = writing.write(
        a_record(notes=["pinned"], facts={"drift": 0.01, "version": "of a file"}),
        tmp_path / "new",
        draw=lambda path: path.write_bytes(PNG) and None,
        json_file=tmp_path / "copy.json",
        console=Console(quiet=True),
    )
    assert [path.name for path in paths] == [f"decode_xeon-2c_2026-11-22.{ending}" for ending in ("md", "json", "png")]
    text = paths[0].read_text("utf-8")
    assert "* command: `odmoe bench decode`" in text
    assert "| on-demand |" in text
    assert "](decode_xeon-2c_2026-11-22.png)" in text
    written = json.loads(paths[1].read_text("utf-8"))
    assert written["rows"] == ROWS
    assert (written["machine"]["slug"], written["drift"], written["version"]) == ("xeon-2c", 0.01, "0.1.0")
    assert (tmp_path / "copy.json").read_bytes() == paths[1].read_bytes()


def test_a_place_that_cannot_be_written_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        writing.write(a_record(), tmp_path / "file", draw=print, json_file=None, console=Console(quiet=True))


def test_the_picture_of_a_decode_record_is_drawn(tmp_path: Path) -> None:
    rows = [
        {"variant": name, "link_ratio": ratio, "ratio_to_resident": 0.5, "stall_share": 0.2}
        for name in ("on-demand", "on-demand-late", "lru")
        for ratio in (4.4, 3.0)
    ]
    resident = {"variant": "resident", "link_ratio": None, "ratio_to_resident": 1.0, "stall_share": None}
    plot_decode.draw([resident, *rows], tmp_path / "a.png", title="T")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_the_papers_marks_are_its_printed_figures_over_its_resident_run() -> None:
    assert plot_decode.PAPER["on-demand-late"] == 0.755
    assert plot_decode.PAPER["no-predictor"] == pytest.approx(0.211, abs=5e-4)
    assert plot_decode.PAPER["token-only"] == pytest.approx(0.706, abs=5e-4)


def a_curve(token: Any, kv: Any, precision: str = "int8") -> dict[str, Any]:
    told = {"label": "x", "precision": precision, "scope": "model", "align_token": token, "align_kv": kv}
    return {**told, "recall": [1.0, 0.5, 0.25], "alive": [4, 2, 0]}


def test_curves_are_those_of_an_int8_copy_in_the_papers_order() -> None:
    own = a_curve("off", "1") | {"prompt_kv": "own"}
    curves = [own, a_curve("1", "1", "nf4"), a_curve("off", "off"), a_curve("1", "4"), a_curve(1, "off"), a_curve(1, 1)]
    assert [name for name, _ in plot_recall.chosen_curves(curves)] == ["token and KV", "token only", "neither"]
    assert {curve["precision"] for _, curve in plot_recall.chosen_curves(curves)} == {"int8"}
    assert plot_recall.chosen_curves([]) == []


def test_a_curve_is_smoothed_by_how_many_answers_were_that_long() -> None:
    assert plot_recall.smoothed([1.0, 0.5, 0.25], [4, 2, 0], window=2) == pytest.approx([1.0, 5 / 6, 0.5])


def test_rivals_are_drawn_by_their_distance(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"predictor": "shadow", "precision": "int8", "align_token": 1, "align_kv": 1, "recall": 0.99},
        {"predictor": "gate", "layers_ahead": 2, "recall": 0.6},
        {"predictor": "gate", "layers_ahead": 1, "recall": 0.8},
        {"predictor": "random", "layers_ahead": None, "recall": 0.25},
    ]
    assert dict(plot_recall.rivals(rows)) == {"gate": [(1, 0.8), (2, 0.6)], "random": [(None, 0.25)]}
    plot_recall.draw(rows, [a_curve(1, 1)], tmp_path / "a.png", title="T")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_a_recall_record_keeps_what_the_file_has(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"rows": [{"predictor": "random", "recall": 0.25}], "prompts": 60}))
    record = recall.record_of(recall.read(file), machine=XEON, command="odmoe bench recall")
    assert [column.field for column in record.columns] == ["predictor", "recall"]
    assert record.facts == {"prompts": 60, "curves": []}


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"rows": [{"recall": 1}]}'])
def test_a_file_that_is_no_recall_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(recall.RecallError):
        recall.read(tmp_path / "a.json")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(plotting.NoPlottingError, match=r"pip install 'odmoe\[bench\]'"):
        plotting.require()


def test_the_shadows_bytes_are_what_the_predictor_says() -> None:
    line = "INFO p: loaded in 3.0 s: the shadow holds 225.8 MB for 884.7 MB in the store"
    assert shadow_bytes(line) == 225_800_000
    assert shadow_bytes(None) == 0


def test_a_layer_of_the_shadow_takes_what_its_later_slices_do() -> None:
    slices = [
        ("shadow L0", 900.0),
        ("shadow L1", 100.0),
        ("shadow L12", 300.0),
        ("shadow L2", 200.0),
        ("experts L1", 7.0),
    ]
    events = [{"ph": "X", "name": name, "dur": dur} for name, dur in slices]
    events.append({"ph": "i", "name": "shadow L1", "dur": 0})
    assert shadow_layer_s(json.dumps({"traceEvents": events})) == pytest.approx(200e-6)
    assert shadow_layer_s(json.dumps({"traceEvents": []})) is None
