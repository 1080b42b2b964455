"""Addresses of links: which are local, and which socket options a link over them gets. Knows no messages."""

import ipaddress
import os
from typing import Final

import zmq

from odmoe_wire.checks import Limits

HANDSHAKE_S: Final = 5.0
RECONNECT_FIRST_S: Final = 0.05
RECONNECT_MAX_S: Final = 1.0
KEEPALIVE_IDLE_S: Final = 30


class EndpointError(ValueError):
    """An address that cannot or may not be used; the message says what to do."""


def is_local(endpoint: str) -> bool:
    """Whether only this host can reach it (inproc, ipc, tcp on loopback); raises `EndpointError`."""
    scheme, _, rest = endpoint.partition("://")
    if scheme in ("inproc", "ipc") and rest:
        return True
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not (port == "*" or (port.isdecimal() and int(port) < 65536)):
        raise EndpointError(f"{endpoint!r} is no endpoint: write tcp://HOST:PORT, ipc://PATH or inproc://NAME")
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def context(*, num_links: int) -> "zmq.Context[zmq.Socket[bytes]]":
    """For a process with so many links: an I/O thread for each, see `DealerLink.connect`."""
    return zmq.Context(num_links)


def require_keys(endpoint: str, *, has_keys: bool) -> None:
    """Raise `EndpointError` when other hosts could reach the endpoint and there are no keys."""
    if not has_keys and not is_local(endpoint):
        raise EndpointError(
            f"{endpoint} is open to other hosts and there are no keys: make them with `odmoe keys DIR` and "
            "name that directory on every host, or use tcp://127.0.0.1:PORT"
        )


def configure(socket: "zmq.Socket[bytes]", endpoint: str, *, hwm: int, limits: Limits) -> None:
    """Options every link has: bounded queues, no lingering, bounded messages and handshakes, keepalive."""
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = hwm
    socket.maxmsgsize = max(limits.max_blob_bytes, limits.max_header_bytes)
    socket.handshake_ivl = int(1000 * HANDSHAKE_S)
    socket.reconnect_ivl = int(1000 * RECONNECT_FIRST_S)
    socket.reconnect_ivl_max = int(1000 * RECONNECT_MAX_S)
    socket.connect_timeout = int(1000 * HANDSHAKE_S)
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = KEEPALIVE_IDLE_S
    socket.ipv6 = "[" in endpoint


def bind(socket: "zmq.Socket[bytes]", endpoint: str) -> str:
    """Bind and give the endpoint in use, port filled in; only the owner may open an ipc socket's file."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot bind {endpoint}: {error.strerror}; choose another address") from None
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    path = bound.removeprefix("ipc://")
    if path != bound and not path.startswith("@"):
        os.chmod(path, 0o600)
    return bound
