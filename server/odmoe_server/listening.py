"""The socket clients connect to. Bound before anything slow begins, so that a taken port is told at once."""

import errno
import socket


class AddressError(ValueError):
    """The address cannot be listened on; the message says what to do."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; connections are refused until it does. Raises `AddressError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise AddressError(f"--host {host} is no address of this machine ({error.strerror})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise AddressError(_advice(host, port, error)) from None
    return listener


def inherited(descriptor: int) -> socket.socket:
    """A socket that the process which started this one has bound."""
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise AddressError(f"--listen-fd {descriptor} is no socket ({error.strerror})") from None


def url(listener: socket.socket) -> str:
    """Where a client on this machine finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _advice(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} is in use: stop what uses it, or choose another with --port (0 takes a free one)"
        case errno.EACCES:
            return f"port {port} needs privileges: choose one above 1023 with --port"
        case errno.EADDRNOTAVAIL:
            return f"--host {host} is no address of this machine; 127.0.0.1 and 0.0.0.0 always are"
    return f"cannot listen on {host} port {port}: {error.strerror}"
