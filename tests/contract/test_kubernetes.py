"""The manifests: what Kubernetes' own schemas say of them, and whether they fit together and fit odmoe.

Looks at the files alone; no cluster is asked. Flags in a manifest are read by the settings of the role they are for.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from odmoe_node.config import NodeSettings
from odmoe_predictor.config import PredictorSettings
from odmoe_server.config import ServerSettings
from odmoe_wire.settings import RoleSettings, parse

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUBERNETES = "1.33"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text("utf-8"))
SETTINGS: dict[str, type[RoleSettings]] = {
    "server": ServerSettings,
    "predictor": PredictorSettings,
    "node": NodeSettings,
}
WORKLOADS = ("Deployment", "StatefulSet")


def manifests() -> Iterator[dict[str, Any]]:
    for name in KUSTOMIZATION["resources"]:
        yield from yaml.safe_load_all((FOLDER / name).read_text("utf-8"))


ALL = list(manifests())
named = pytest.mark.parametrize("manifest", ALL, ids=[f"{m['kind']}-{m['metadata']['name']}" for m in ALL])


def workloads() -> dict[str, dict[str, Any]]:
    """Component -> pod template."""
    return {
        m["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: m["spec"]["template"]
        for m in ALL
        if m["kind"] in WORKLOADS
    }


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    return wanted.items() <= labels.items() and all(labels.get(e["key"]) in e["values"] for e in expressions)


def components(selector: dict[str, Any]) -> set[str]:
    """Those of our pods a selector selects."""
    return {name for name, template in workloads().items() if selects(selector, template["metadata"]["labels"])}


@named
def test_it_is_what_kubernetes_takes(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_validator_refuses_what_is_wrong() -> None:
    broken = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": {"replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_every_file_is_in_the_kustomization() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])


@pytest.mark.parametrize("component", SETTINGS)
def test_flags_are_those_of_the_role(component: str) -> None:
    (container,) = workloads()[component]["spec"]["containers"]
    args = [argument.replace("$(POD_NAME)", "node-0") for argument in container["args"]]
    settings: Any = parse(SETTINGS[component], args, prog=component)
    assert str(settings.keys_dir) == "/keys"
    assert settings.log_format == "json"
    if component == "server":
        return
    addresses = {m["metadata"]["name"]: m for m in ALL if m["kind"] == "Service"}
    for endpoint in filter(None, (settings.server_endpoint, getattr(settings, "predictor_endpoint", None))):
        host, _, port = endpoint.removeprefix("tcp://").partition(":")
        assert addresses[host]["spec"]["ports"][0]["port"] == int(port)
        assert addresses[host]["spec"]["publishNotReadyAddresses"] is True, "else nobody would ever become ready"


def test_services_lead_to_ports_that_are_open() -> None:
    for service in (m for m in ALL if m["kind"] == "Service"):
        (component,) = components({"matchLabels": service["spec"]["selector"]})
        (container,) = workloads()[component]["spec"]["containers"]
        open_ports = {port["name"] for port in container.get("ports", ())}
        assert {port["targetPort"] for port in service["spec"].get("ports", ())} <= open_ports
    (nodes,) = (m for m in ALL if m["kind"] == "StatefulSet")
    assert nodes["spec"]["serviceName"] in {m["metadata"]["name"] for m in ALL if m["kind"] == "Service"}


def volume_sources(template: dict[str, Any]) -> Iterator[tuple[str, str, set[str]]]:
    """(kind, name, keys asked for) of every volume that something else has to provide."""
    for volume in template["spec"]["volumes"]:
        if "persistentVolumeClaim" in volume:
            yield "claim", volume["persistentVolumeClaim"]["claimName"], set()
        if "secret" in volume:
            yield "secret", volume["secret"]["secretName"], set()
        for source in volume.get("projected", {}).get("sources", ()):
            keys = {item["key"] for item in source["secret"].get("items", ())}
            yield "secret", source["secret"]["name"], keys


def test_every_volume_comes_from_somewhere() -> None:
    claims = {m["metadata"]["name"] for m in ALL if m["kind"] == "PersistentVolumeClaim"}
    secrets = {s["name"]: {Path(file).name for file in s["files"]} for s in KUSTOMIZATION["secretGenerator"]}
    used = set()
    for template in workloads().values():
        for kind, name, keys in volume_sources(template):
            assert name in (claims if kind == "claim" else secrets), name
            assert kind == "claim" or keys <= secrets[name]
            used.add(name)
        mounts = chain.from_iterable(
            c["volumeMounts"] for c in (*template["spec"]["containers"], *template["spec"].get("initContainers", ()))
        )
        assert {mount["name"] for mount in mounts} == {volume["name"] for volume in template["spec"]["volumes"]}
    assert used == claims | set(secrets)


def test_there_is_a_key_for_each_pod() -> None:
    (nodes,) = (m for m in ALL if m["kind"] == "StatefulSet")
    pods = [f"{nodes['metadata']['name']}-{i}" for i in range(nodes["spec"]["replicas"])]
    files = {s["name"]: s["files"] for s in KUSTOMIZATION["secretGenerator"]}
    assert files["node-keys"] == [f"keys/{pod}.key_secret" for pod in pods]
    assert files["public-keys"] == [f"keys/public/{name}.key" for name in ("server", "predictor", *pods)]


@pytest.mark.parametrize("component", SETTINGS)
def test_nobody_has_more_rights_than_needed(component: str) -> None:
    spec = workloads()[component]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    own = [mount["name"] for mount in spec["containers"][0]["volumeMounts"]]
    assert "all-keys" not in own, "a node agent sees its own key alone"


def test_who_may_talk_to_whom() -> None:
    """Each link of the cluster is allowed at both of its ends, and nothing else is."""
    policies = [m["spec"] for m in ALL if m["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    ends: dict[str, set[tuple[str, str, int]]] = {"ingress": set(), "egress": set()}
    for policy in policies:
        for own in components(policy["podSelector"]):
            for way, other_end in (("ingress", "from"), ("egress", "to")):
                for rule in policy.get(way, ()):
                    others = chain.from_iterable(components(peer["podSelector"]) for peer in rule.get(other_end, ()))
                    for other in others:
                        pair = (other, own) if way == "ingress" else (own, other)
                        ends[way] |= {(*pair, port["port"]) for port in rule["ports"]}
    wanted = {("node", "server", 5700), ("predictor", "server", 5700), ("node", "predictor", 5701)}
    assert ends == {"ingress": wanted, "egress": wanted}


def test_drains_take_one_node_at_a_time() -> None:
    (budget,) = (m["spec"] for m in ALL if m["kind"] == "PodDisruptionBudget")
    assert budget["maxUnavailable"] == 1
    assert components(budget["selector"]) == {"node"}
