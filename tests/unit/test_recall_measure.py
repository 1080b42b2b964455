"""What `python -m odmoe_predictor.recall` measures and writes, on a tiny model; how rivals count; the questions."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import torch
from rich.console import Console
from torch import Tensor

from odmoe_model.prepare import prepare
from odmoe_model.toy_tokenizer import SPECIAL_IDS, write_toy_tokenizer
from odmoe_predictor.recall.__main__ import main
from odmoe_predictor.recall.alignment import Alignment, is_due
from odmoe_predictor.recall.contest import contest, training_tokens
from odmoe_predictor.recall.lockstep import Batch
from odmoe_predictor.recall.meter import Meter
from odmoe_predictor.recall.plan import PREDICTORS, TOGETHER, ShadowRun, batches, rival_runs, shadow_runs
from odmoe_predictor.recall.questions import HELD_OUT, TRAINING
from odmoe_predictor.recall.record import Record, Step
from odmoe_predictor.recall.results import Results, label, shadow_curve, shadow_row
from odmoe_predictor.recall.slabs import SlabCache
from odmoe_predictor.recall.tally import Tally
from odmoe_predictor.rivals.base import Forecasts
from odmoe_wire.messages import Wants
from support.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
VOCAB = 320


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recall")
    tiny_checkpoint("mixtral", directory / "checkpoint", vocab_size=VOCAB, **SPECIAL_IDS)
    write_toy_tokenizer(directory / "checkpoint", vocab=VOCAB, context=512)
    prepare(directory / "checkpoint", directory / "store")
    return directory / "store"


def measured(store: Path, file: Path, *options: str) -> dict[str, Any]:
    main(["--store", str(store), "--json", str(file), "--prompts", "3", "--tokens", "5", *options])
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def test_file_has_a_row_for_every_setting(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(store, tmp_path / "recall.json")
    rows = found["rows"]
    shadows = [row for row in rows if row["predictor"] == "shadow"]
    settings = {
        (row["precision"], row["scope"], row["align_token"], row["align_kv"], row["prompt_kv"]) for row in shadows
    }
    assert len(settings) == len(shadows) == 27
    assert {
        (precision, scope, 1, 1, "full") for precision in ("fp16", "nf4") for scope in ("model", "experts")
    } < settings
    assert {
        ("int8", "model", "off", "off", "full"),
        ("int8", "model", 16, 1, "full"),
        ("int8", "model", 1, 1, "own"),
    } < settings
    assert [(row["predictor"], row["layers_ahead"]) for row in rows if row["predictor"] != "shadow"] == [
        ("random", None),
        ("frequency", None),
        ("previous", None),
        *((name, ahead) for name in ("gate", "trained") for ahead in (1, 2)),
    ]
    assert all(row["run_ahead"] == 0 and 0 <= row["recall"] <= row["covered"] <= 1 for row in rows)
    assert {row["tokens"] for row in rows} == {sum(found["curves"][0]["alive"])}
    held = {(row["precision"], row["scope"]): row["bytes"] for row in shadows}
    assert held["fp16", "model"] > held["int8", "model"] > held["nf4", "model"] > 0
    assert held["int8", "experts"] > held["int8", "model"]
    assert (found["prompts"], found["tokens_per_prompt"], found["threads"], found["quick"]) == (3, 5, 1, False)
    assert found["seconds"] > 0
    assert "mixtral" in found["model"]
    assert "int8 shadow" in capsys.readouterr().err


def test_quick_measures_less_and_filters_less_still(store: Path, tmp_path: Path) -> None:
    quick = measured(store, tmp_path / "quick.json", "--quick", "--precision", "int8", "fp16", "--scope", "model")
    assert [row["predictor"] for row in quick["rows"]].count("shadow") == 5
    only = measured(store, tmp_path / "only.json", "--predictor", "random", "gate")
    assert {row["predictor"] for row in only["rows"]} == {"random", "gate"}
    assert not only["curves"]


def test_same_seed_gives_the_same_rows(store: Path, tmp_path: Path) -> None:
    options = ("--quick", "--predictor", "random", "trained", "--seed", "5")
    first, again = (measured(store, tmp_path / f"{name}.json", *options)["rows"] for name in "ab")
    other = measured(store, tmp_path / "c.json", *options[:-1], "6")["rows"]
    assert first == again != other


def test_no_room_and_no_store_end_with_a_sentence(store: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is room for"):
        measured(store, tmp_path / "x.json", "--tokens", "500")
    with pytest.raises(SystemExit, match="manifest"):
        measured(tmp_path, tmp_path / "x.json")
    with pytest.raises(SystemExit, match="No such file"):
        measured(store, tmp_path / "nowhere" / "x.json")


def test_plan_has_what_the_paper_has_and_more() -> None:
    everything = {"precisions": ("fp16", "int8", "nf4", "int4"), "scopes": ("model", "experts")}
    runs = {(run.precision, run.scope): run for run in shadow_runs(quick=False, **everything)}  # type: ignore[arg-type]
    assert len(runs) == 8
    assert all(run.alignments[0] == Alignment() for run in runs.values())
    settings = {(each.token, each.kv) for each in runs["int8", "model"].alignments}
    assert {(1, None), (None, 1), (None, None), (1, 16), (16, 1), (8, 8)} < settings
    assert [each for batch in batches(runs["int8", "model"]) for each in batch] == [*runs["int8", "model"].alignments]
    assert max(map(len, batches(runs["int8", "model"]))) == TOGETHER
    assert len(rival_runs(quick=False, predictors=PREDICTORS, num_layers=30)) == 3 + 2 * 5
    assert {run.layers_ahead for run in rival_runs(quick=False, predictors=["gate"], num_layers=4)} == {1, 2, 3}


def test_period_is_due_at_the_first_step_and_then_every_so_many() -> None:
    assert [step for step in range(9) if is_due(step, 4)] == [0, 4, 8]
    assert [step for step in range(9) if is_due(step, None)] == [0]


LAYERS: Final = 3


class ScriptedRival:
    """Says for each layer what it would be, at the times it is told to; remembers what it was told."""

    held_bytes: Final = 77

    def __init__(self, at_token: Forecasts, at_routed: dict[int, Forecasts], *, wants: Wants = "routings") -> None:
        self.at_token, self.at_routed, self.wants = at_token, at_routed, wants
        self.told: list[tuple[int, int, list[int], list[float] | None]] = []

    def begin(self, sequence: int) -> None:
        self.told.append((sequence, -1, [], None))

    def end(self, sequence: int) -> None:
        self.told.append((sequence, -2, [], None))

    def on_token(self, sequence: int) -> Forecasts:
        return self.at_token

    def on_routed(self, sequence: int, layer: int, experts: list[int], x_TH: Tensor | None) -> Forecasts:
        self.told.append((sequence, layer, experts, None if x_TH is None else x_TH.flatten().tolist()))
        return self.at_routed.get(layer, {})


@pytest.fixture
def record() -> Record:
    """Two answers of two tokens and one; in the second step the batch still has the one that stopped."""
    routed_LbK = torch.tensor([[[0, 1], [2, 3]], [[2, 1], [4, 5]], [[6, 7], [0, 7]]])
    inputs = [torch.arange(2.0)[:, None] + 10 * layer for layer in range(LAYERS)]
    rows_b, tokens_b = torch.tensor([0, 1]), torch.tensor([5, 6])
    steps = [
        Step(rows_b=rows_b, tokens_b=tokens_b, alive_b=torch.tensor(alive), routed_LbK=routed_LbK, inputs_LbH=inputs)
        for alive in ([True, True], [False, True])
    ]
    slabs = SlabCache(num_layers=1, slots=4)
    return Record(batch=Batch.of([[1], [2]]), prompts=[[1], [2]], slabs=slabs, steps=steps)


def test_forecast_counts_when_it_is_there_as_the_gate_speaks(record: Record) -> None:
    late_and_newer = {0: {0: [2, 3], 1: [1, 2]}, 1: {0: [0, 1]}}
    rival = ScriptedRival({0: [0, 1], 1: [6, 7]}, late_and_newer)
    found = contest(rival, record)
    # Layer 0 is right for the first answer only; layer 1's newer forecast too; layer 2 is never forecast.
    assert found.tally.hits_N == [4, 0]
    assert found.tally.alive_N == [2, 1]
    assert found.tally.recall == 4 / 18
    assert found.covered == pytest.approx(2 / 3)
    assert found.bytes == 77


def test_rival_is_told_of_live_tokens_in_order_and_of_inputs_if_it_wants_them(record: Record) -> None:
    rival = ScriptedRival({}, {}, wants="inputs")
    assert contest(rival, record).tally.recall == 0.0
    second = [(1, 0, [2, 3], [1.0]), (1, 1, [4, 5], [11.0]), (1, 2, [0, 7], [21.0])]
    assert rival.told == [
        (0, -1, [], None),
        (0, 0, [0, 1], [0.0]),
        (0, 1, [2, 1], [10.0]),
        (0, 2, [6, 7], [20.0]),
        (0, -2, [], None),
        (1, -1, [], None),
        *second,
        *second,
        (1, -2, [], None),
    ]


def test_training_examples_know_the_token_before_them(record: Record) -> None:
    tokens = training_tokens(record)
    assert tokens.before_N.tolist() == [-1, -1, 1]
    assert tokens.experts_NLK[:, 0].tolist() == [[0, 1], [2, 3], [2, 3]]


def test_file_is_replaced_in_one_go_and_says_off(tmp_path: Path) -> None:
    file = tmp_path / "recall.json"
    results = Results(path=file, model="m", prompts=1, tokens_per_prompt=2, threads=1, quick=False, seed=0)
    results.write()
    alignment, tally = (
        Alignment(token=None, kv=4, prompt_kv="own"),
        Tally(hits_N=[3, 1], alive_N=[1, 1], num_needed=4, agreed=1, guesses=1),
    )
    run = ShadowRun(precision="nf4", scope="experts", alignments=(alignment,))
    results.rows.append(shadow_row(run, alignment, tally, held_bytes=9, ms_per_step=1.5))
    results.curves.append(shadow_curve(run, alignment, tally))
    results.write()
    read = json.loads(file.read_text(encoding="utf-8"))
    assert (read["rows"][0]["align_token"], read["rows"][0]["align_kv"], read["rows"][0]["recall"]) == ("off", 4, 0.5)
    assert read["rows"][0]["agreement"] == 1.0
    assert read["curves"][0]["recall"] == [0.75, 0.25]
    assert read["curves"][0]["label"] == "nf4 experts, token off, KV 4, own prompt"
    assert label(run, Alignment(kv=None)) == "nf4 experts, token only"
    assert [path.name for path in tmp_path.iterdir()] == ["recall.json"]


def test_meter_says_each_phase_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter([1, 3], console=Console(stderr=True)) as meter:
        on_done = meter.phase("first", units=2)
        on_done()
        meter.phase("second", units=1)()
    assert meter.tasks[0].completed == 4
    assert "0% first" in (said := capsys.readouterr().err)
    assert "25% second" in said


def chat_prompts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chat_prompts", ROOT / "deploy/default-model/chat_prompts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_questions_are_the_default_models_own_and_held_out() -> None:
    prompts = chat_prompts()
    assert list(HELD_OUT) == prompts.heldout_prompts(count=64, seed=20261122)
    assert list(TRAINING) == prompts.train_prompts(count=40, seed=20261122)
    assert not set(HELD_OUT) & set(TRAINING)
    subjects = {" ".join(subject.split()) for subject in prompts._TRAIN_SUBJECTS.split(";")}
    for way in prompts._WAYS:
        assert not {way.format(s=subject) for subject in subjects} & set(HELD_OUT)
