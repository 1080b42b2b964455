"""Key files: made once, kept secret, and loaded only when they are what they should be."""

from pathlib import Path

import pytest

from odmoe_wire.keys import CurveKeys, KeysError, make


def test_a_pair_for_each_name_and_secrets_for_the_owner_alone(tmp_path: Path) -> None:
    written = make(tmp_path / "keys", ["server", "node-1", "server"])
    assert {path.relative_to(tmp_path / "keys").as_posix() for path in written} == {
        "server.key_secret",
        "public/server.key",
        "node-1.key_secret",
        "public/node-1.key",
    }
    assert all(path.stat().st_mode & 0o777 == (0o600 if path.suffix == ".key_secret" else 0o644) for path in written)
    loaded = CurveKeys.load(tmp_path / "keys", name="node-1")
    assert loaded.peers["node-1"] == loaded.public != loaded.secret
    assert set(loaded.peers) == {"server", "node-1"}
    assert loaded.secret.decode() not in repr(loaded)
    assert loaded.secret.decode() not in (tmp_path / "keys/public/node-1.key").read_text()


def test_pairs_that_are_there_stay(tmp_path: Path) -> None:
    make(tmp_path, ["server"])
    before = CurveKeys.load(tmp_path, name="server")
    written = make(tmp_path, ["server", "node-1"])
    assert {path.stem for path in written} == {"node-1"}
    assert CurveKeys.load(tmp_path, name="server").secret == before.secret


def test_half_a_pair_is_made_anew(tmp_path: Path) -> None:
    make(tmp_path, ["server"])
    (tmp_path / "public/server.key").unlink()
    assert len(make(tmp_path, ["server"])) == 2
    CurveKeys.load(tmp_path, name="server")


@pytest.mark.parametrize("name", ["", "../server", "a/b", "-x", "x" * 65, "nöde"])
def test_names_that_are_no_peer_ids(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeysError, match="letters, digits"):
        make(tmp_path / "keys", ["server", name])
    assert not (tmp_path / "keys").exists()


def test_a_secret_open_to_all_is_refused(tmp_path: Path) -> None:
    make(tmp_path, ["server"])
    (tmp_path / "server.key_secret").chmod(0o604)
    with pytest.raises(KeysError, match="chmod 600"):
        CurveKeys.load(tmp_path, name="server")


def test_missing_mismatched_and_secretless_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="odmoe keys"):
        CurveKeys.load(tmp_path, name="server")
    make(tmp_path, ["server", "node-1"])
    public = tmp_path / "public"
    (public / "server.key").write_text((public / "node-1.key").read_text())
    with pytest.raises(KeysError, match="public half"):
        CurveKeys.load(tmp_path, name="server")
    (tmp_path / "server.key_secret").write_text((public / "node-1.key").read_text())
    with pytest.raises(KeysError, match="no secret key"):
        CurveKeys.load(tmp_path, name="server")


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    make(tmp_path, ["server", "node-1"])
    file = tmp_path / "public/node-1.key"
    file.write_text(file.read_text().replace('key = "', 'key = "x'))
    with pytest.raises(KeysError, match=r"node-1\.key is damaged"):
        CurveKeys.load(tmp_path, name="server")


def test_a_peer_that_is_not_known(tmp_path: Path) -> None:
    make(tmp_path, ["node-1"])
    with pytest.raises(KeysError, match=r"server\.key"):
        CurveKeys.load(tmp_path, name="node-1").public_key_of("server")
