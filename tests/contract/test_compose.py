"""`docker-compose.yml` as text: ten services, each bounded and without rights, one port, each its own secret.

That an engine holds them to it is shown by `make test-containers`.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NODES = [f"node-{number}" for number in range(8)]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return loaded


@pytest.fixture
def services(whole: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = whole["services"]
    return found


def test_there_are_ten(services: dict[str, Any]) -> None:
    assert sorted(services) == sorted(["server", "predictor", *NODES])


def test_each_is_bounded_and_has_no_rights(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"].startswith("${ODMOE_UID:-10001}"), name
        assert service["mem_limit"], name
        assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices"} & set(service), name


def test_one_port_is_published_and_only_on_this_host(services: dict[str, Any], whole: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert list(published) == ["server"]
    (port,) = published["server"]
    assert port.startswith("127.0.0.1:")
    assert whole["networks"]["cluster"] == {"internal": True}
    assert [name for name, service in services.items() if service["networks"] != ["cluster"]] == ["server"]


def test_each_sees_its_own_secret_and_nothing_it_could_write_to(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert all(volume.endswith(":ro") for volume in service["volumes"]), name
        secrets = [volume for volume in service["volumes"] if "key_secret" in volume]
        assert secrets == [f"${{ODMOE_KEYS}}/{name}.key_secret:/keys/{name}.key_secret:ro"], name


def test_each_says_how_it_is(services: dict[str, Any]) -> None:
    image = (ROOT / "Dockerfile").read_text("utf-8")
    for name, service in services.items():
        if name == "server":
            assert "/health" in image.partition("HEALTHCHECK")[2]
            continue
        (health_file,) = (word.partition("=")[2] for word in service["command"] if word.startswith("--health-file"))
        assert health_file in service["healthcheck"]["test"][1], name


def test_the_gpu_file_changes_nodes_only(services: dict[str, Any]) -> None:
    gpu = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text("utf-8"))["services"]
    assert sorted(gpu) == NODES
    for service in gpu.values():
        assert set(service) <= {"environment", "mem_limit", "deploy"}
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
