"""What `odmoe serve` starts: commands, endpoints, threads, the settings it hands on, the line it prints."""

import io
import os
import shlex
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from rich.console import Console

from odmoe_server import launch, listening
from odmoe_server.config import ServerSettings, ServeSettings
from odmoe_server.launch_plan import Plan, children, environment
from odmoe_wire.settings import load


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listening.bind("127.0.0.1", 0) as bound:
        yield bound


def plan(tmp_path: Path, listener: socket.socket, *, cores: int = 2, **chosen: object) -> Plan:
    return Plan(
        settings=ServeSettings(**chosen),  # type: ignore[arg-type]
        store=tmp_path / "store",
        top_k=2,
        runtime=tmp_path,
        listener=listener,
        cores=cores,
    )


def option(command: "list[str] | tuple[str, ...]", name: str) -> str:
    return command[list(command).index(name) + 1]


def test_one_server_some_nodes_one_predictor(tmp_path: Path, listener: socket.socket) -> None:
    specs = children(plan(tmp_path, listener, nodes=3))
    assert [spec.name for spec in specs] == ["server", "node-0", "node-1", "node-2", "predictor"]
    assert [spec.name for spec in specs if spec.stops_first] == ["server"]


def test_everybody_finds_everybody(tmp_path: Path, listener: socket.socket) -> None:
    _, node, _, predictor = children(plan(tmp_path, listener))
    cluster = f"ipc://{tmp_path}/cluster.sock"
    assert option(list(node.command), "--server-endpoint") == cluster
    assert option(list(predictor.command), "--server-endpoint") == cluster
    assert option(list(node.command), "--predictor-endpoint") == option(list(predictor.command), "--endpoint")
    for spec in (node, predictor):
        assert option(list(spec.command), "--store") == str(tmp_path / "store")
        assert "--exit-with-parent" in spec.command


def test_no_predictor(tmp_path: Path, listener: socket.socket) -> None:
    specs = children(plan(tmp_path, listener, predictor=False))
    assert [spec.name for spec in specs] == ["server", "node-0", "node-1"]
    assert "--predictor-endpoint" not in specs[1].command


@pytest.mark.parametrize(
    ("chosen", "flag", "value"),
    [({}, "--slots", "4"), ({"slots": 3}, "--slots", "3"), ({"memory_mb": 100}, "--memory-mb", "100")],
)
def test_room_of_a_node(tmp_path: Path, listener: socket.socket, chosen: dict[str, int], flag: str, value: str) -> None:
    node = list(children(plan(tmp_path, listener, **chosen))[1].command)
    assert option(node, flag) == value
    assert ("--slots" in node) != ("--memory-mb" in node)


def test_alignment_goes_to_the_server_and_running_ahead_to_the_predictor(
    tmp_path: Path, listener: socket.socket
) -> None:
    specs = children(plan(tmp_path, listener, align_token="2", align_kv="off", run_ahead=3))
    server = load(ServerSettings, list(specs[0].command[4:]), prog="x")
    assert (server.align_token, server.align_kv) == ("2", "off")
    assert option(list(specs[-1].command), "--run-ahead") == "3"


def test_device_of_the_nodes(tmp_path: Path, listener: socket.socket) -> None:
    specs = children(plan(tmp_path, listener, node_device="emulated", link_gbps=2.5, predictor=False))
    for node in specs[1:]:
        assert option(list(node.command), "--device") == "emulated"
        assert option(list(node.command), "--link-gbps") == "2.5"
    node = list(children(plan(tmp_path, listener))[1].command)
    assert option(node, "--device") == "auto"
    assert "--link-gbps" not in node


@pytest.mark.parametrize(
    ("cores", "chosen", "of_server", "of_node"),
    [(1, {}, 1, 1), (2, {}, 1, 1), (16, {}, 8, 4), (16, {"nodes": 8}, 8, 1), (16, {"threads": 3}, 3, 3)],
)
def test_threads_are_shared_out(
    tmp_path: Path, listener: socket.socket, cores: int, chosen: dict[str, int], of_server: int, of_node: int
) -> None:
    specs = children(plan(tmp_path, listener, cores=cores, **chosen))
    assert specs[0].environment["OMP_NUM_THREADS"] == str(of_server)
    assert specs[1].environment["OMP_NUM_THREADS"] == option(list(specs[1].command), "--threads") == str(of_node)


def test_the_server_gets_the_same_settings(tmp_path: Path, listener: socket.socket) -> None:
    chosen = plan(
        tmp_path,
        listener,
        model="default",
        api_key=SecretStr('se"cret\\'),
        keep_alive_s=1.5,
        served_model_names=("a", "b"),
        host="0.0.0.0",
        max_context=99,
    )
    server = children(chosen)[0]
    got = load(ServerSettings, list(server.command[4:]), prog="odmoe server")
    assert server.command[3] == "server"
    assert got.model == str(tmp_path / "store")
    assert got.api_key is not None
    assert got.api_key.get_secret_value() == 'se"cret\\'
    assert (got.keep_alive_s, got.served_model_names, got.host, got.max_context) == (1.5, ("a", "b"), "0.0.0.0", 99)
    assert got.endpoint == f"ipc://{tmp_path}/cluster.sock"
    assert got.exit_with_parent
    assert got.listen_fd == listener.fileno()
    assert tuple(server.pass_fds) == (listener.fileno(),)


def test_a_name_is_found_when_none_is_given(tmp_path: Path, listener: socket.socket) -> None:
    server = children(plan(tmp_path, listener, model="partitioned"))[0]
    assert load(ServerSettings, list(server.command[4:]), prog="x").served_model_names == ("partitioned",)


def test_children_take_nothing_from_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODMOE_SERVER_PORT", "1")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    ours = environment(3)
    assert "ODMOE_SERVER_PORT" not in ours
    assert ours["SOMETHING_ELSE"] == "kept"


def test_the_runtime_directory_is_private_and_goes_away() -> None:
    with launch.runtime_directory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert len(str(directory / "predictor.sock")) < 100, "the kernel takes no longer paths for sockets"
        (directory / "file").touch()
    assert not directory.exists()


def test_the_greeting_has_a_curl_line_a_shell_understands(tmp_path: Path, listener: socket.socket) -> None:
    text = launch.greeting(plan(tmp_path, listener, model="default"))
    curl = next(line for line in text.splitlines() if line.startswith("curl "))
    port = listener.getsockname()[1]
    command = shlex.split(curl)
    assert command[1] == f"http://127.0.0.1:{port}/v1/chat/completions"
    assert '"model": "default"' in option(command, "-d")
    assert "Authorization" not in text


def test_the_greeting_tells_of_the_key_but_not_which(tmp_path: Path, listener: socket.socket) -> None:
    text = launch.greeting(plan(tmp_path, listener, api_key=SecretStr("secret")))
    assert "Bearer $ODMOE_API_KEY" in text
    assert "secret" not in text


# -------------------------------------------------------------------------------------------------------- listening


def test_a_port_in_use() -> None:
    with listening.bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(listening.AddressError, match=r"in use.*--port"):
            listening.bind("127.0.0.1", first.getsockname()[1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may")
def test_a_privileged_port() -> None:
    with pytest.raises(listening.AddressError, match="--port"):
        listening.bind("127.0.0.1", 80)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_is_not_ours(host: str) -> None:
    with pytest.raises(listening.AddressError, match="--host"):
        listening.bind(host, 0)


def test_an_address_for_clients() -> None:
    with listening.bind("0.0.0.0", 0) as bound:
        assert listening.url(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_descriptor_that_is_no_socket() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w"), pytest.raises(listening.AddressError, match="--listen-fd"):
        listening.inherited(reading)


# ------------------------------------------------------------------------------------------------- when to greet


def health(state: str, **alive: bool) -> dict[str, object]:
    nodes = [{"id": name.replace("_", "-"), "alive": up} for name, up in alive.items()]
    return {"state": state, "detail": "in words", "nodes": nodes}


@pytest.mark.parametrize(
    ("answer", "patient", "said"),
    [
        (health("loading"), True, "in words"),
        (health("waiting", predictor=True), False, "in words"),
        (health("ready", node_0=True), True, "waiting for node-1, predictor"),
        (health("ready", node_0=True, node_1=False, predictor=True), True, "waiting for node-1"),
        (health("ready", node_0=True), False, None),
        (health("ready", node_0=True, node_1=True, predictor=True), True, None),
    ],
)
def test_what_one_waits_for(answer: dict[str, object], patient: bool, said: str | None) -> None:
    expected = ["node-0", "node-1", "predictor"]
    assert launch.obstacle(answer, expected=expected, patient=patient) == said


def test_who_was_asked_to_end_hears_no_warnings_of_it() -> None:
    output = io.StringIO()
    voices = launch.Voices(console=Console(file=output, width=200), all_of_it=False, ending=True)
    voices.forward("node-0", "12:00 WARNING the server says bye")
    voices.forward("node-0", "12:00 ERROR   and this is bad")
    assert output.getvalue().splitlines() == ["node-0    | 12:00 ERROR   and this is bad"]


def test_the_quiet_are_heard_when_they_die() -> None:
    output = io.StringIO()
    voices = launch.Voices(console=Console(file=output, width=200), all_of_it=False)
    voices.forward("server", "12:00 INFO    said by the server")
    voices.forward("node-0", "12:00 INFO    nothing special")
    voices.forward("node-0", "12:00 WARNING [red]careful")
    assert output.getvalue().splitlines() == [
        "server    | 12:00 INFO    said by the server",
        "node-0    | 12:00 WARNING [red]careful",
    ]
    voices.last_words("node-0")
    assert output.getvalue().splitlines()[-1] == "node-0    | 12:00 INFO    nothing special"
