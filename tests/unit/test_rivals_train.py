"""A rival trained on a trace: what it learns, which examples it is shown, and which files it refuses."""

import random
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from odmoe_model.trace import TraceError, TraceHeader, TraceReader
from odmoe_predictor.rivals import fitting, train, weights
from odmoe_predictor.rivals.base import Shape
from odmoe_predictor.rivals.examples import inputs_of, joined, tokens_of
from odmoe_predictor.rivals.trained import ExpertScores, TrainedRival
from odmoe_predictor.rivals.weights import WeightsError

SHAPE = Shape(num_layers=4, num_experts=8, top_k=2)
HEADER = TraceHeader(
    odmoe_trace=1,
    model_type="mixtral",
    store_digest="d",
    num_layers=4,
    num_experts=8,
    top_k=2,
    package_version="0",
    created="2026-01-01T00:00:00+00:00",
)
Token = list[list[int]]


def write(path: Path, sequences: dict[int, list[Token]], *, header: TraceHeader = HEADER, first: int = 10) -> Path:
    """A trace of decode steps of one token each, one sequence after the other."""
    lines: list[object] = [header]
    for sequence, tokens in sequences.items():
        for position, token in enumerate(tokens, start=first):
            for layer, experts in enumerate(token):
                lines.append([[[sequence, position, 1]], layer, [experts], [[0.5, 0.5]], None])
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    return path


def structured(num_tokens: int, *, seed: int) -> list[Token]:
    """A layer's experts follow from the layer before; the first layer's from the last token's, now and then by lot."""
    lot = random.Random(seed)
    tokens: list[Token] = []
    first = lot.randrange(8)
    for _ in range(num_tokens):
        first = (3 * first + 1) % 8 if lot.random() < 0.9 else lot.randrange(8)
        tokens.append([[(first + 3 * layer) % 8, (5 * first + layer) % 8] for layer in range(4)])
    return [[sorted({a, b} | ({(a + 1) % 8} if a == b else set())) for a, b in token] for token in tokens]


def test_training_finds_the_structure_frequency_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "t", {1: structured(800, seed=1), 2: structured(400, seed=2)})
    out = tmp_path / "w.safetensors"
    train.main([str(trace), "--out", str(out), "--look-ahead", "2", "--epochs", "12", "--width", "64"])
    assert capsys.readouterr().out == f"{out}\n"
    model = weights.load(out, shape=SHAPE, store_digest="d")
    assert (model.look_ahead, model.width) == (2, 64)
    fresh = write(tmp_path / "fresh", {1: structured(300, seed=3)})
    tokens = tokens_of(TraceReader.open(fresh).steps(), SHAPE)
    frequent = fitting.recall_of_the_most_frequent(tokens, tokens, SHAPE)
    assert fitting.recall(model, tokens) > frequent + 0.3
    assert served_recall(TrainedRival(model), structured(300, seed=3)) == pytest.approx(fitting.recall(model, tokens))


def served_recall(rival: TrainedRival, tokens: list[Token]) -> float:
    """As a server would meet it: told layer by layer."""
    rival.begin(1)
    found = 0
    for token in tokens:
        forecasts = rival.on_token(1)
        for layer, experts in enumerate(token):
            found += len(set(forecasts[layer]) & set(experts))
            forecasts |= rival.on_routed(1, layer, experts, None)
    return found / (len(tokens) * SHAPE.num_layers * SHAPE.top_k)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", {1: structured(60, seed=1)})
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, ("0", "0", "1"), strict=True):
        train.main([str(trace), "--out", str(file), "--epochs", "1", "--width", "8", "--seed", seed])
    one, same, other = (load_file(file)["inputs.weight"] for file in files)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ---------------------------------------------------------------------------------------------- examples


def test_tokens_follow_one_another_only_within_a_sequence(tmp_path: Path) -> None:
    a, b = [[[0, 1]] * 4] * 2, [[[2, 3]] * 4] * 3
    path = write(tmp_path / "t", {1: a, 2: b})
    later = write(tmp_path / "u", {1: a}, first=40)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:-1]))  # the last token lacks its last layer
    parts = [tokens_of(TraceReader.open(each).steps(), SHAPE) for each in (path, later)]
    tokens = joined(parts)
    assert tokens.before_N.tolist() == [-1, 0, -1, 2, -1, 4]
    assert tokens.experts_NLK[:, 0, 0].tolist() == [0, 0, 2, 2, 0, 0]
    first, last = tokens.split(1 / 2)
    assert first.before_N.tolist() == [-1, 0, -1]
    assert last.before_N.tolist() == [-1, -1, 1], "the token before the cut is out of sight"


def test_a_training_example_is_what_serving_would_ask(tmp_path: Path) -> None:
    rows = structured(5, seed=4)
    tokens = tokens_of(TraceReader.open(write(tmp_path / "t", {1: rows})).steps(), SHAPE)
    model = ExpertScores(SHAPE, look_ahead=2, width=4)
    for token, layer in [(0, 0), (0, 3), (3, 1), (4, 2), (4, 3)]:
        (example,) = inputs_of(model, tokens, torch.tensor([token]), torch.tensor([layer])).tolist()
        before = dict(enumerate(rows[token - 1])) if token else {}
        expected = model.places(layer=layer, before=before, now=dict(enumerate(rows[token])))
        assert sorted(place for place in example if place != model.padding) == sorted(expected)


# ------------------------------------------------------------------------------------ files that are refused


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    weights.save(ExpertScores(SHAPE, look_ahead=1, width=8), path, store_digest="d")
    return path


def changed(path: Path, **fields: object) -> None:
    """The file with another header."""
    model = ExpertScores(SHAPE, look_ahead=1, width=8)
    header = {"store_digest": "d", "num_layers": 4, "num_experts": 8, "top_k": 2, "look_ahead": 1, "width": 8}
    metadata = {"odmoe_rival": msgspec.json.encode({"version": 1, **header, **fields}).decode()}
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"store_digest": "other"}, "for the store other, this is d"),
        ({"num_experts": 9}, "train it on traces of this model"),
        ({"look_ahead": 0}, "there cannot be"),
        ({"look_ahead": 5}, "there cannot be"),
        ({"width": 16}, "its header asks for"),
        ({"width": 1 << 40}, "there cannot be"),
        ({"hidden": 8}, "no file of odmoe train-predictor"),
    ],
)
def test_weights_with_another_header_are_refused(good: Path, fields: dict[str, object], said: str) -> None:
    weights.load(good, shape=SHAPE, store_digest="d")
    changed(good, **fields)
    with pytest.raises(WeightsError, match=said) as error:
        weights.load(good, shape=SHAPE, store_digest="d")
    assert str(good) in str(error.value)


def test_damaged_weights_are_refused(good: Path) -> None:
    whole = good.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole + b"\0", b"\xff" * 200):
        good.write_bytes(damaged)
        with pytest.raises(WeightsError, match="cannot be read"):
            weights.load(good, shape=SHAPE, store_digest="d")
    good.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.load(good, shape=SHAPE, store_digest="d")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(8, dtype=torch.float16), torch.full((8,), torch.nan), torch.full((8,), torch.inf)]
)
def test_weights_that_are_no_numbers_are_refused(good: Path, tensor: torch.Tensor) -> None:
    model = ExpertScores(SHAPE, look_ahead=1, width=8)
    model.load_state_dict({**model.state_dict(), "hidden.bias": tensor}, assign=True)
    weights.save(model, good, store_digest="d")
    with pytest.raises(WeightsError, match=r"hidden.bias has values that are no finite float32"):
        weights.load(good, shape=SHAPE, store_digest="d")


def test_weights_of_something_else_are_refused(good: Path) -> None:
    save_file({"a": torch.zeros(3)}, good)
    with pytest.raises(WeightsError, match="no file of odmoe train-predictor"):
        weights.load(good, shape=SHAPE, store_digest="d")


def run_into(argv: list[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    return str(ended.value.code)


def test_the_command_names_what_it_cannot_use(tmp_path: Path) -> None:
    trace, out = str(write(tmp_path / "t", {1: structured(40, seed=1)})), str(tmp_path / "w")
    bad = tmp_path / "bad"
    bad.write_bytes(Path(trace).read_bytes() + b"[[[1,99,1]],0,[[0,8]],[[0.5,0.5]],null]\n")
    other = str(write(tmp_path / "o", {1: structured(40, seed=1)}, header=msgspec.structs.replace(HEADER, top_k=3)))
    short = str(write(tmp_path / "s", {1: structured(5, seed=1)}))
    none = str(tmp_path / "none")
    assert f"{bad}, line 162" in run_into([str(bad), "--out", out])
    assert f"{trace} and {other} are traces of two models" in run_into([trace, other, "--out", out])
    assert "5 whole tokens" in run_into([short, "--out", out])
    assert none in run_into([none, "--out", out])
    assert "no routing trace" in run_into([str(weights_of(tmp_path)), "--out", out])
    assert "--look-ahead 5: the model has 4" in run_into([trace, "--out", out, "--look-ahead", "5"])
    assert f"--out {none}/w" in run_into([trace, "--out", f"{none}/w"])
    assert run_into([trace]) == "2"
    assert run_into([trace, "--out", out, "--epochs", "0"]) == "2"
    assert run_into([trace, "--out", out, "--look-ahead", "0"]) == "2"
    assert "--width 65537: at most" in run_into([trace, "--out", out, "--width", "65537"])
    assert not Path(out).exists()


def weights_of(directory: Path) -> Path:
    weights.save(ExpertScores(SHAPE, look_ahead=1, width=8), directory / "x", store_digest="d")
    return directory / "x"


def test_traces_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    one = write(tmp_path / "t", {1: structured(40, seed=1)})
    other = write(tmp_path / "o", {}, header=msgspec.structs.replace(HEADER, store_digest="e"))
    with pytest.raises(TraceError, match="two models"):
        fitting.read([one, other])
