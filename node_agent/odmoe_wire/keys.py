"""CURVE key pairs of a cluster: making them, loading them, and who may connect. Knows no messages.

A directory made by `make` has `public/NAME.key` for every peer, which goes to every host, and
`NAME.key_secret`, which goes only to the host of that peer. A key is an identity: its name is the peer id.
"""

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq
from zmq.auth import load_certificate
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from odmoe_wire.checks import is_peer_id

ZAP_DOMAIN: Final = "odmoe"
Z85_KEY_LENGTH: Final = 40


class KeysError(ValueError):
    """Keys are missing, unreadable or not kept secret; the message says what to do."""


@dataclass(frozen=True)
class CurveKeys:
    """One peer's own pair (Z85 text as bytes) and the public keys of all peers it knows, itself included."""

    name: str
    public: bytes
    secret: bytes = field(repr=False)
    peers: Mapping[str, bytes]

    @classmethod
    def load(cls, directory: Path, *, name: str) -> "CurveKeys":
        """Own secret of peer `name` and every public key found in `directory`; raises `KeysError`."""
        secret_file = directory / f"{name}.key_secret"
        public, secret = _read(secret_file)
        if secret is None:
            raise KeysError(f"{secret_file} holds no secret key; make keys with: odmoe keys {directory}")
        if secret_file.stat().st_mode & stat.S_IRWXO:
            raise KeysError(f"{secret_file} is open to every user of this host; run: chmod 600 {secret_file}")
        peers = {path.stem: _read(path)[0] for path in sorted((directory / "public").glob("*.key"))}
        if peers.get(name) != public:
            raise KeysError(f"{directory}/public/{name}.key is not the public half of {secret_file}; copy both again")
        return cls(name, public, secret, peers)

    def public_key_of(self, peer: str) -> bytes:
        """The pinned key of a peer; raises `KeysError` when it is not known."""
        if peer not in self.peers:
            raise KeysError(f"no public key of {peer!r}; copy {peer}.key into the public/ folder of the keys")
        return self.peers[peer]


def make(directory: Path, names: Iterable[str]) -> list[Path]:
    """Make a pair for each name that has none yet, secrets readable by the owner alone; the paths written."""
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if not is_peer_id(name):
            raise KeysError(f"{name!r} cannot name a peer: use 1 to 64 letters, digits, '.', '_' or '-'")
    public_dir = directory / "public"
    public_dir.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name in wanted:
        public_file, secret_file = public_dir / f"{name}.key", directory / f"{name}.key_secret"
        if public_file.exists() and secret_file.exists():
            continue
        public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
        _write(secret_file, f'curve\n    public-key = "{public}"\n    secret-key = "{secret}"\n', mode=0o600)
        _write(public_file, f'curve\n    public-key = "{public}"\n', mode=0o644)
        written += [secret_file, public_file]
    return written


class Gatekeeper(ThreadAuthenticator):
    """Tells libzmq who may connect: the keys it was given. A connection's user id is the name of its key."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", *, keys: CurveKeys) -> None:
        super().__init__(context)
        self._names = {key: name for name, key in keys.peers.items()}
        self.certs[ZAP_DOMAIN] = dict.fromkeys(self._names, True)

    def curve_user_id(self, client_public_key: bytes) -> str:
        """Name of the key, called only for keys that were let in."""
        return self._names[z85.encode(client_public_key)]

    def stop(self) -> None:
        """Stop the thread; one that has died already must not be waited for."""
        if self.pipe is not None and not self.is_alive():
            self.pipe.close(linger=0)
            self.pipe = None  # type: ignore[assignment]  # as pyzmq itself marks it closed
        super().stop()


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(path)
    except (OSError, ValueError) as error:
        raise KeysError(f"cannot read the key {path} ({error}); make keys with: odmoe keys DIR") from None
    if any(len(key) != Z85_KEY_LENGTH for key in (public, secret) if key is not None):
        raise KeysError(f"{path} is damaged: a key has {Z85_KEY_LENGTH} characters; copy it again")
    return public, secret


def _write(path: Path, text: str, *, mode: int) -> None:
    """Write with the mode from the first byte on; an older file of that name is replaced."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
