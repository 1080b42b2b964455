"""Routing traces: what is written is what is read, whatever became of the file in between."""

from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import torch

from odmoe_model.trace import MAX_LINE_BYTES, Routing, TraceError, TraceHeader, TraceReader
from odmoe_server.moe.trace import RoutedCall, TraceFile
from odmoe_server.recording import Recorder
from odmoe_wire.messages import Span

HEADER = TraceHeader(
    odmoe_trace=1,
    model_type="mixtral",
    store_digest="d",
    num_layers=2,
    num_experts=8,
    top_k=2,
    package_version="0",
    created="2026-01-01T00:00:00+00:00",
)


def routed(position: int, layer: int, *, length: int = 1, forecast: frozenset[int] = frozenset({1, 5})) -> RoutedCall:
    index_TK = torch.tensor([[5, 1]] * length)
    weight_TK = torch.tensor([[0.6999999, 0.3]] * length)
    return RoutedCall((Span(3, position, length),), layer, index_TK, weight_TK, forecast)


def write(path: Path, *calls: RoutedCall, dropped: int = 0, header: TraceHeader = HEADER) -> Path:
    with closing(TraceFile(path, header)) as file:
        file.write(calls, dropped)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t", routed(40, 0), routed(40, 1, forecast=frozenset()), routed(41, 0, length=2))
    reader = TraceReader.open(path)
    assert reader.header == HEADER
    assert list(reader) == [
        Routing(spans=[Span(3, 40)], layer=0, experts=[[5, 1]], weights=[[0.7, 0.3]], forecast=[1, 5]),
        Routing(spans=[Span(3, 40)], layer=1, experts=[[5, 1]], weights=[[0.7, 0.3]], forecast=None),
        Routing(spans=[Span(3, 41, 2)], layer=0, experts=[[5, 1]] * 2, weights=[[0.7, 0.3]] * 2, forecast=[1, 5]),
    ]
    assert list(reader) == list(reader), "it can be read again"


def test_a_line_is_compact_and_the_header_names_its_fields(tmp_path: Path) -> None:
    first, second = write(tmp_path / "t", routed(40, 0)).read_text().splitlines()
    assert '"fields":["spans","layer","experts_TK","weights_TK","forecast"]' in first
    assert second == "[[[3,40,1]],0,[[5,1]],[[0.7,0.3]],[1,5]]"


def test_half_precision_weights(tmp_path: Path) -> None:
    call = routed(40, 0)
    halved = RoutedCall(call.spans, 0, call.index_TK, torch.tensor([[0.75, 0.25]], dtype=torch.bfloat16), call.forecast)
    (routing,) = TraceReader.open(write(tmp_path / "t", halved))
    assert routing.weights == [[0.75, 0.25]]


def test_steps(tmp_path: Path) -> None:
    path = write(tmp_path / "t", *(routed(position, layer) for position in (40, 41) for layer in (0, 1)))
    steps = list(TraceReader.open(path).steps())
    assert [step.spans[0].position for step in steps] == [40, 41]
    assert [list(step.layers) for step in steps] == [[0, 1], [0, 1]]


def test_an_answer_that_begins_where_one_broke_off(tmp_path: Path) -> None:
    path = write(tmp_path / "t", routed(40, 0), routed(40, 0), routed(40, 1))
    assert [list(step.layers) for step in TraceReader.open(path).steps()] == [[0], [0, 1]]


def test_a_last_line_that_was_not_finished(tmp_path: Path) -> None:
    path = write(tmp_path / "t", routed(40, 0), routed(40, 1))
    path.write_bytes(path.read_bytes()[:-5])
    assert [routing.layer for routing in TraceReader.open(path)] == [0]


def test_what_was_dropped_is_told(tmp_path: Path) -> None:
    reader = TraceReader.open(write(tmp_path / "t", routed(40, 0), dropped=9))
    assert len(list(reader)) == 1
    assert reader.dropped == 9


def test_a_full_trace_makes_room(tmp_path: Path) -> None:
    small = TraceHeader(**{name: getattr(HEADER, name) for name in HEADER.__struct_fields__} | {"cap_bytes": 1000})
    with closing(TraceFile(tmp_path / "t", small)) as file:
        for position in range(1, 101):
            file.write([routed(position, 0)], 0)
    parts = [tmp_path / "t.1", tmp_path / "t"]
    assert all(part.stat().st_size <= 1000 for part in parts)
    positions = [routing.spans[0].position for part in parts for routing in TraceReader.open(part)]
    assert positions == list(range(1, 101))[-len(positions) :]


@pytest.mark.parametrize(
    "line",
    [
        "[[[3,40,1]],2,[[5,1]],[[0.7,0.3]],null]",
        "[[[3,40,1]],0,[[5,8]],[[0.7,0.3]],null]",
        "[[[3,40,1]],0,[[5,1]],[[0.7,0.3]],[-1]]",
        "[[[3,40,1]],0,[[5]],[[0.7]],null]",
        "[[[3,40,2]],0,[[5,1]],[[0.7,0.3]],null]",
        "[[[3,40,2],[3,42,-1]],0,[[5,1]],[[0.7,0.3]],null]",
        "[[[3,-1,1]],0,[[5,1]],[[0.7,0.3]],null]",
        "[[[3,40,1]],0,[[5,1]]]",
        '{"other":1}',
        "nonsense",
    ],
)
def test_lines_that_do_not_fit(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "t", routed(40, 0))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(TraceError, match="line 3"):
        list(TraceReader.open(path))


@pytest.mark.parametrize("first", ["", "{}", "[]", '{"odmoe_trace": 1}', "\x00"])
def test_files_that_are_no_trace(tmp_path: Path, first: str) -> None:
    (tmp_path / "t").write_text(first + "\n")
    with pytest.raises(TraceError, match="no routing trace"):
        TraceReader.open(tmp_path / "t")


@pytest.mark.parametrize(
    ("field", "value"), [("num_layers", 0), ("num_layers", 1 << 40), ("num_experts", 1 << 40), ("top_k", 9)]
)
def test_a_trace_of_an_impossible_model(tmp_path: Path, field: str, value: int) -> None:
    path = tmp_path / "t"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(HEADER, **{field: value})) + b"\n")
    with pytest.raises(TraceError, match="no model there can be"):
        TraceReader.open(path)


def test_a_line_without_end(tmp_path: Path) -> None:
    path = write(tmp_path / "t", routed(40, 0))
    path.write_bytes(path.read_bytes() + b" " * (MAX_LINE_BYTES + 1) + b"\n")
    with pytest.raises(TraceError, match="line 3: it is too long"):
        list(TraceReader.open(path))


def test_a_trace_of_another_version(tmp_path: Path) -> None:
    path = write(tmp_path / "t")
    path.write_text(path.read_text().replace('"odmoe_trace":1', '"odmoe_trace":2'))
    with pytest.raises(TraceError, match="version 2"):
        TraceReader.open(path)


def test_recording_touches_no_tensor_where_the_model_runs(tmp_path: Path) -> None:
    """On a GPU, reading one would wait for it: the recorder does so when it writes."""
    file = TraceFile(tmp_path / "t", HEADER)
    recorder = Recorder(file, name="the trace")
    recorder.put(RoutedCall((Span(3, 40),), 0, torch.empty(1, 2, device="meta"), torch.empty(1, 2), frozenset()))
    recorder.put(routed(40, 1))
    assert len((tmp_path / "t").read_text().splitlines()) == 1
    file.close()
