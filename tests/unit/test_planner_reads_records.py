"""What `odmoe bench decode` writes, `odmoe plan --bench` reads: the same names with the same meaning on both sides."""

from pathlib import Path

import pytest

from odmoe_model.manifest import read_manifest
from odmoe_server.bench import decode_record, variants
from odmoe_server.bench.decode import Findings, Question
from odmoe_server.bench.pinning import Cores
from odmoe_server.bench.reading import Reading
from odmoe_server.bench.record import Machine
from odmoe_server.bench.resident import Decoded, Found, Measured
from odmoe_server.bench.rows import DeviceBytes, Run
from odmoe_server.planner import bench, bench_record
from support.stores import tiny_store

MACHINE = Machine(cpu="x", cores=2, memory_gb=1.0, system="y")


def a_run(variant: str, *, link_ratio: float, token_s: float) -> Run:
    reading = Reading(
        between_s=10 * token_s, between_tokens=10, activations=60, predicted=57, predicted_late=1, loads=45
    )
    return Run(
        variant=variant,
        link_ratio=link_ratio,
        link_gbps=1.0,
        slots=1,
        decoded=[reading],
        first_s=[2.0],
        identical=True,
        device=DeviceBytes(server=1, nodes=(1,) * 4),
    )


def findings(store: Path) -> Findings:
    """Of a tiny Mixtral: 3 layers of 8 experts, top-2."""
    measured = Measured(implementation="eager", answers=[Decoded(tokens=[1] * 11, decode_s=3.0)], first_s=[1.0])
    found = Found(measured=[measured], main_s=0.02, expert_s=0.04, weight_bytes=1000)
    asked = Question(
        store=store,
        variants=[],
        link_ratios=[4.4],
        nodes=4,
        group_size=2,
        tokens=11,
        prompt_tokens=16,
        first_prompt_tokens=128,
        repeats=1,
    )
    return Findings(
        question=asked,
        manifest=read_manifest(store),
        cores=Cores(main=1, beside=0),
        before=found,
        after=found,
        fastest="eager",
        layer_s=0.1,
        shadow_layer_s=0.03,
        runs=[a_run(variant.name, link_ratio=4.4, token_s=1.5) for variant in variants.VARIANTS],
        without_loads=[a_run(name, link_ratio=1e-3, token_s=0.33) for name in ("on-demand", "no-predictor")],
    )


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> bench_record.BenchRecord:
    found = findings(tiny_store("mixtral", tmp_path_factory.mktemp("store")))
    file = tmp_path_factory.mktemp("record") / "r.json"
    file.write_text(decode_record.record_of(found, machine=MACHINE, command="c").json(), "utf-8")
    return bench_record.read(file)


def test_every_variant_is_predicted(record: bench_record.BenchRecord) -> None:
    compared = bench.compare(record)
    assert [row.variant for row in compared] == ["resident", *(variant.name for variant in variants.VARIANTS)]
    assert all(row.predicted_tokens_per_s is not None for row in compared)
    assert all(row.predicted_first_s is not None for row in compared if row.variant != "resident")
    assert set(bench.FORECASTS) == {variant.name for variant in variants.VARIANTS}


def test_steps_of_several_tokens_are_asked_of_the_model_as_they_were_measured() -> None:
    measured = {variant.name: variant.settings for variant in variants.VARIANTS}
    for name, forecast in bench.FORECASTS.items():
        assert forecast.draft == measured[name].get("draft", 0)
        assert not forecast.draft or forecast.run_ahead == measured[name]["run_ahead"]


def test_figures_mean_the_same(record: bench_record.BenchRecord) -> None:
    """A layer of 0.11 s without loads, of which 0.1 s are computing, has four messages."""
    assert (record.shape.moe_layers, record.shape.experts, record.shape.top_k) == (3, 8, 2)
    assert bench.message_s(record, bench.FORECASTS["no-predictor"]) == pytest.approx(0.01 / 4)
    on_demand, lru = (next(row for row in record.rows if row.variant == name) for name in ("on-demand", "lru"))
    times = bench.times_of(record, on_demand, bench.FORECASTS["on-demand"])
    assert times.load_s == (pytest.approx(0.44),) * 4
    assert times.shadow_s == 0.03
    # 58 of 60 forecast, two of them late or not; 45 of the 60 that ten tokens needed were loaded.
    assert bench.forecast_of(record, on_demand).recall == (pytest.approx(58 / 60),)
    assert bench.forecast_of(record, lru).recall == (pytest.approx(15 / 60),)


@pytest.mark.parametrize(
    "variant", [one for one in variants.VARIANTS if one.settings.get("draft") == 0], ids=lambda v: v.name
)
def test_variants_are_aligned_as_they_are_measured(variant: variants.Variant) -> None:
    forecast, settings = bench.FORECASTS[variant.name], variant.settings
    assert forecast.run_ahead == settings["run_ahead"]
    assert (forecast.align_token == 0) is (settings.get("align_token") == "off")
    assert (forecast.align_kv == 0) is (settings.get("align_kv") == "off")
