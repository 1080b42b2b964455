"""Which names a client may call this server by. Pure; knows the Host header, no socket.

Against DNS rebinding: a page from elsewhere lets its own name point here and asks in its visitor's browser, as if it
came from here. Such a request says that name. Plain addresses cannot be pointed elsewhere, so they are let in always.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final
from urllib.parse import urlsplit

ANY: Final = ("*",)
OF_THIS_MACHINE: Final = ("localhost", "*.localhost")


def names_allowed(said: Sequence[str], *, host: str, has_keys: bool) -> tuple[str, ...]:
    """What the operator `said`; else the names of this machine where only it can reach `host` and nobody needs a key;
    else any, since containers and proxies call a server by names of their own."""
    if said:
        return tuple(name.lower() for name in said)
    if has_keys or not is_loopback(host):
        return ANY
    return OF_THIS_MACHINE


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def is_allowed(header: str | None, names: Sequence[str]) -> bool:
    """Whether a Host header names one of these; `*.x` stands for all names below x, `*` for all there are."""
    if "*" in names:
        return True
    try:
        host = (urlsplit(f"//{header or ''}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if _address(host) is not None:
        return True
    return any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in names)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
