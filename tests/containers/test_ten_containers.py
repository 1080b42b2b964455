"""`make test-containers`: images built, ten containers up, asked through the one published port, hurt, whole again.

Everything is real: engine, images, networks, keys, the OpenAI SDK. Takes minutes, so `make test` leaves it out.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from openai import OpenAI

from chaos.clients import Question, questions
from containers import engine as engines
from containers import ten
from containers.ten import NODES, SERVICES, Ten
from odmoe_model.prepare import prepare
from support.serve_process import chat_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("ODMOE_TEST_CONTAINERS" not in os.environ, reason="make test-containers runs it"),
]
NUM_TOKENS = 48
AWAY_S = 15.0  # looking up the name of a container that is gone takes 10 s by itself


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Question]]:
    """A store, and questions with transformers' answers."""
    home = tmp_path_factory.mktemp("model")
    checkpoint = chat_checkpoint(home / "checkpoint")
    prepare(checkpoint, home / "store")
    for folder in (home, *home.parents):  # the services run as somebody else
        if folder.owner() == home.owner() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    return home / "store", questions(checkpoint, num_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def cluster(asked: tuple[Path, list[Question]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ten]:
    try:
        engine = engines.find()
    except engines.NoEngine as reason:
        pytest.skip(f"NO CONTAINERS WERE TESTED: {reason}")
    ten.build(engine)
    with ten.running(engine, store=asked[0], home=tmp_path_factory.mktemp("ten")) as running:
        yield running


def stream(cluster: Ten, question: Question, *, at: int = -1, do: Callable[[], None] = lambda: None) -> str:
    """A streamed answer; something is done after so many of its pieces."""
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=240)
    body = question.body()
    pieces = client.chat.completions.create(
        model=body["model"],
        messages=body["messages"],
        temperature=0,
        max_tokens=question.num_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    for number, piece in enumerate(pieces):
        if number == at:
            do()
        if piece.choices:
            text += piece.choices[0].delta.content or ""
    return text


def test_every_question_is_answered_as_transformers_does(cluster: Ten, asked: tuple[Path, list[Question]]) -> None:
    for question in asked[1]:
        assert stream(cluster, question) == question.answer
    with ThreadPoolExecutor(len(asked[1])) as clients:
        answers = list(clients.map(lambda question: stream(cluster, question), asked[1]))
    assert answers == [question.answer for question in asked[1]]


def test_what_the_engine_holds_each_container_to(cluster: Ten) -> None:
    for service in SERVICES:
        found = cluster.inspect(service)
        host = found["HostConfig"]
        assert found["State"]["Running"], service
        assert found["Config"]["User"] not in ("", "0", "root", "0:0"), service
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["Memory"] > 0, service
        assert not host["Privileged"], service
        writable = [mount["Destination"] for mount in found["Mounts"] if mount["RW"]]
        assert writable == [], service
        published = {port: where for port, where in found["NetworkSettings"]["Ports"].items() if where}
        assert set(published) == ({"8000/tcp"} if service == "server" else set()), service
    assert cluster.docker("network", "inspect", "-f", "{{.Internal}}", f"{ten.PROJECT}_cluster") == "true"
    for service in SERVICES:
        cluster.until(partial(cluster.is_healthy, service), f"{service} to be healthy")


def test_the_gpu_override_is_taken_by_this_compose(cluster: Ten) -> None:
    files = ["-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml"]
    merged = cluster.engine.run(*cluster.engine.compose, *files, "config", ODMOE_STORE="/store", ODMOE_KEYS="/keys")
    assert merged.count("capabilities") >= len(NODES)
    assert merged.count("ODMOE_NODE_DEVICE: cuda") == len(NODES)
    assert merged.count("ODMOE_NODE_NODE_ID") == len(NODES), "what the first file says stays"


def test_a_node_has_no_web_stack_no_way_out_and_nowhere_to_write(cluster: Ten) -> None:
    def python(script: str) -> str:
        return cluster.docker("exec", cluster.container("node-3"), "python3", "-c", script)

    web = ("fastapi", "starlette", "uvicorn")
    assert python(f"import importlib.util as u; print([m for m in {web} if u.find_spec(m)])") == "[]"
    write = "\ntry: open('/opt/odmoe/x', 'w')\nexcept OSError as e: print(e.errno)\n"
    assert python(write) in ("13", "30")  # no permission, or a read-only file system
    others = [other for other in NODES if other != "node-3"]
    secrets = (
        f"import os; print(sorted(os.listdir('/keys')), [os.path.exists(f'/keys/{{n}}.key_secret') for n in {others}])"
    )
    assert python(secrets) == f"['node-3.key_secret', 'public'] {[False] * len(others)}"
    gateway = "import socket; s = socket.socket(); s.settimeout(3); print(s.connect_ex(('1.1.1.1', 53)) != 0)"
    assert python(gateway) == "True"
    address = cluster.inspect("node-3")["NetworkSettings"]["Networks"][f"{ten.PROJECT}_cluster"]["IPAddress"]
    with socket.socket() as knock:
        knock.settimeout(3)
        assert knock.connect_ex((address, 5700)) != 0, "a node listens to nobody"


@pytest.mark.parametrize(
    ("victim", "hurt", "mend"),
    [("node-0", Ten.kill, Ten.start), ("node-1", Ten.pause, Ten.unpause), ("predictor", Ten.kill, Ten.start)],
    ids=["a node killed", "a node paused", "the predictor killed"],
)
def test_hurt_in_mid_stream_the_answer_stays_the_same(
    cluster: Ten,
    asked: tuple[Path, list[Question]],
    victim: str,
    hurt: Callable[[Ten, str], None],
    mend: Callable[[Ten, str], None],
) -> None:
    question = asked[1][0]
    assert stream(cluster, question, at=4, do=lambda: hurt(cluster, victim)) == question.answer
    mend(cluster, victim)
    cluster.until(cluster.is_whole, "all to take part again")
    assert stream(cluster, question) == question.answer


def test_a_predictor_that_stays_away_costs_no_node(cluster: Ten, asked: tuple[Path, list[Question]]) -> None:
    """The name of a container that is down is answered by nobody: looking it up may not cost nodes their other link."""
    cluster.kill("predictor")
    until_s = time.monotonic() + AWAY_S
    while time.monotonic() < until_s:
        missing = set(NODES) - cluster.alive()
        assert not missing, f"{missing} went too\n{cluster.last_words()}"
        time.sleep(0.5)
    assert stream(cluster, asked[1][0]) == asked[1][0].answer
    cluster.start("predictor")
    cluster.until(cluster.is_whole, "all to take part again")


def test_the_server_restarts_and_everyone_comes_back(cluster: Ten, asked: tuple[Path, list[Question]]) -> None:
    cluster.kill("server")
    cluster.start("server")
    cluster.until(cluster.is_whole, "all to take part again")
    assert stream(cluster, asked[1][1]) == asked[1][1].answer
