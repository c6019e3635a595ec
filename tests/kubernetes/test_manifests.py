"""Kubernetes manifests: valid, the same as chart and as kustomize, and true to what the server does."""

from __future__ import annotations

import copy
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.server.api import ROUTES
from deploy.server.cli import parse
from deploy.server.metrics import Metrics
from tests.kubernetes.render import CHART, CLOUDS, FOLDER, ROOT, Objects, chart, helm, kustomize, validate

METRIC = "serve_queue_wait_seconds"
YAML = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml"))
DEPLOYMENT = ("Deployment", "torch-ext")


base_chart = functools.cache(chart)


@functools.cache
def overlay(cloud: str) -> Objects:
    return kustomize(FOLDER / "overlays" / cloud)


def with_component(folder: Path, name: str) -> Objects:
    """The base with a component, as an overlay of a user's has it."""
    base, component = (os.path.relpath(FOLDER / part, folder) for part in ("base", f"components/{name}"))
    (folder / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{component}]\n")
    return kustomize(folder)


def values_of(cloud: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((CHART / f"values-{cloud}.yaml").read_text())
    return read


def pod(objects: Objects) -> dict[str, Any]:
    spec: dict[str, Any] = objects[DEPLOYMENT]["spec"]["template"]["spec"]
    return spec


def runtime() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((FOLDER / "kserve" / "servingruntime.yaml").read_text())
    return read


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


# Valid, and a wrong one is caught.


@pytest.mark.parametrize("cloud", CLOUDS)
def test_overlays_are_valid(cloud: str) -> None:
    objects = overlay(cloud)
    assert {kind for kind, _ in objects} == {
        "ServiceAccount", "Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy"
    }  # fmt: skip
    for thing in objects.values():
        validate(thing)


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("Deployment", ("spec", "replica"), 3, "replica"),
        ("Deployment", ("spec", "selector"), None, "selector"),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readOnlyRootFilesystem"), True, "readOnlyRoot"),
        ("Deployment", ("spec", "template", "spec", "terminationGracePeriodSeconds"), "45s", "integer"),
        ("HorizontalPodAutoscaler", ("spec", "maxReplicas"), None, "maxReplicas"),
        ("NetworkPolicy", ("spec", "ingres"), [], "ingres"),
    ],
)
def test_a_wrong_manifest_is_caught(kind: str, path: tuple[Any, ...], value: object, message: str) -> None:
    thing = copy.deepcopy(next(found for (known, _), found in overlay(CLOUDS[0]).items() if known == kind))
    *parents, last = path
    inner = functools.reduce(lambda at, key: at[key], parents, thing)
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(kubernetes_validate.ValidationError, match=message):
        validate(thing)


# One source of truth.


def test_the_chart_is_the_base() -> None:
    assert base_chart() == kustomize(FOLDER / "base")


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_chart_is_the_overlay(cloud: str) -> None:
    assert chart(values_of(cloud)) == overlay(cloud)


def test_the_chart_has_the_components(tmp_path: Path) -> None:
    claim, monitor = tmp_path / "claim", tmp_path / "monitor"
    claim.mkdir()
    monitor.mkdir()
    claimed = with_component(claim, "bundle-claim")
    assert chart({"bundle": {"claim": "torch-ext-bundle"}}) == claimed
    validate(claimed[DEPLOYMENT])
    assert "initContainers" not in pod(claimed)
    monitored = with_component(monitor, "pod-monitor")
    assert chart({"prometheus": {"podMonitor": {"enabled": True}}}) == monitored
    spec = monitored["PodMonitor", "torch-ext"]["spec"]
    assert spec.keys() == {"selector", "podMetricsEndpoints"}
    assert [end.keys() for end in spec["podMetricsEndpoints"]] == [{"port", "path", "interval"}]


def test_releases_are_apart() -> None:
    """Two of one namespace share no name and select no pod of each other."""
    objects = chart(name="second")
    assert not {name for _, name in objects} & {name for _, name in base_chart()}
    for thing in objects.values():
        validate(thing)
        assert "torch-ext'" not in str(thing).replace("'app.kubernetes.io/name': 'torch-ext'", "")


def test_lint() -> None:
    for said in helm(lint=[{}, *map(values_of, CLOUDS)]):
        assert (said["total_charts_linted"], said["errors"]) == (1, [])
        assert [message for message in said["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 3}, "replicas"),
        ({"cpu": 1.5}, "cpu"),  # Part of a core is nobody's alone.
        ({"autoscaling": {"queueWait": "200ms"}}, "queueWait"),
        ({"autoscaling": {"queueWait": "0"}}, "queueWait"),
        ({"autoscaling": {"minReplicas": 5, "maxReplicas": 2}}, "expected minReplicas of at most maxReplicas"),
        ({"memory": "0Gi"}, "memory"),
        ({"apiKeySecret": "a b"}, "apiKeySecret"),
        ({"bundle": {"claim": "A"}}, "claim"),
        ({"nodeSelectorTerms": []}, "nodeSelectorTerms"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    assert message in helm(values=values, name="x")["error"]


def test_labels_can_be_replaced() -> None:
    """As values.yaml says: Helm merges them, and one label too many would let nobody in."""
    labels = {"torch-ext-client": None, "team": "search"}, {"app.kubernetes.io/name": None, "app": "prometheus"}
    policy = chart({"clients": labels[0], "prometheus": {"podLabels": labels[1]}})["NetworkPolicy", "torch-ext"]
    clients, prometheus = policy["spec"]["ingress"][0]["from"]
    assert clients["podSelector"]["matchLabels"] == {"team": "search"}
    assert prometheus["podSelector"]["matchLabels"] == {"app": "prometheus"}


# True to the server.


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nodes(cloud: str) -> None:
    """Every term asks for arm64 and for the cloud's own families; whole cores, which are the pod's alone."""
    spec = pod(overlay(cloud))
    required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    for term in required["nodeSelectorTerms"]:
        first, *families = term["matchExpressions"]
        assert first == {"key": "kubernetes.io/arch", "operator": "In", "values": ["arm64"]}
        assert families
    for container in containers(spec):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert resources["limits"]["cpu"].isdecimal()


@pytest.mark.parametrize("of", ["deployment", "kserve"])
def test_the_server_is_started_as_it_is_meant(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = pod(overlay(CLOUDS[0])) if of == "deployment" else runtime()["spec"]
    server = spec["containers"][0]
    for name in ("PORT", "WORKERS", "DEPLOY_API_KEY", "API_KEY"):
        monkeypatch.delenv(name, raising=False)
    arguments = parse(server["args"])
    assert not arguments.idle
    port = server["ports"][0]["containerPort"]
    assert {"name": "PORT", "value": str(port)} in server["env"]
    served = {(route.method, route.path) for route in ROUTES}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = server[probe]["httpGet"]
        assert ("GET", asked["path"]) in served
        assert asked["port"] in (port, "http")
        assert ("live" in asked["path"]) == (probe == "livenessProbe")
    # Whoever drains longer than its grace period is killed with what it had accepted.
    grace = spec.get("terminationGracePeriodSeconds")
    if grace is None:
        example = yaml.safe_load((FOLDER / "kserve" / "inferenceservice.yaml").read_text())
        grace = example["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace >= arguments.drain_delay_s + arguments.drain_timeout_s + 5


def test_hardened() -> None:
    spec = pod(overlay(CLOUDS[0]))
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "dockerfiles" / "server.Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    context = spec["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == tuple(map(int, user.groups()))
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert overlay(CLOUDS[0])["ServiceAccount", "torch-ext"]["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    for container in (*containers(spec), *containers(runtime()["spec"])):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_who_may_ask() -> None:
    """The policy selects the server's pods and nothing of its clients' labels was changed."""
    objects = overlay(CLOUDS[0])
    policy = objects["NetworkPolicy", "torch-ext"]["spec"]
    labels = objects[DEPLOYMENT]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["egress"] == []
    clients, prometheus = policy["ingress"][0]["from"]
    assert clients == {"podSelector": {"matchLabels": {"torch-ext-client": "true"}}}
    assert prometheus["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    for thing in objects.values():
        selector = thing["spec"].get("selector") if "spec" in thing else None
        if selector is not None:
            assert selector.get("matchLabels", selector) == labels


def test_the_autoscaler_finds_its_metric() -> None:
    metrics = Metrics()
    metrics.gauges(lambda: 0, lambda: 1.5, lambda: 0, lambda: True)
    assert f"\n{METRIC} 1.5\n" in metrics.render().decode()
    spec = overlay(CLOUDS[0])["HorizontalPodAutoscaler", "torch-ext"]["spec"]
    assert spec["metrics"][0]["pods"]["metric"]["name"] == METRIC
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "torch-ext"}
    (rule,) = yaml.safe_load((FOLDER / "monitoring" / "prometheus-adapter-values.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].startswith(METRIC + "{")
    assert rule["name"] == {"matches": f"^{METRIC}$", "as": METRIC}
    assert "replicas" not in overlay(CLOUDS[0])[DEPLOYMENT]["spec"]  # Or every apply would undo the autoscaler.


def test_the_bundle_is_copied(tmp_path: Path) -> None:
    (init,) = pod(overlay(CLOUDS[0]))["initContainers"]
    (tmp_path / "bundle" / "tokenizer").mkdir(parents=True)
    (tmp_path / "bundle" / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "volume").mkdir()  # The volume is there already.
    assert init["command"][:2] == ["python", "-c"]
    code = init["command"][2].replace('"/', f'"{tmp_path}/')
    for _ in range(2):  # A container may start twice.
        subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "volume" / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_kserve() -> None:
    """KServe's own fields by name; what it takes from Kubernetes strictly, as a pod."""
    spec = runtime()["spec"]
    own = {"annotations", "supportedModelFormats", "protocolVersions", "multiModel"}
    inherited = {"nodeSelector", "tolerations", "volumes", "containers"}
    assert spec.keys() == own | inherited
    as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}}
    validate({**as_pod, "spec": {key: spec[key] for key in inherited}})
    assert spec["containers"][0]["name"] == "kserve-container"
    example = yaml.safe_load((FOLDER / "kserve" / "inferenceservice.yaml").read_text())["spec"]["predictor"]
    model = example["model"]
    assert model["runtime"] == runtime()["metadata"]["name"]
    assert model["modelFormat"] in [
        {k: known[k] for k in ("name", "version")} for known in spec["supportedModelFormats"]
    ]
    assert model["protocolVersion"] in spec["protocolVersions"]


# For whoever edits them.


@pytest.mark.parametrize("path", YAML, ids=str)
def test_files_say_what_to_edit(path: Path) -> None:
    text = (FOLDER / path).read_text()
    comments = [line for line in text.splitlines()[:6] if line.lstrip().startswith("#")]
    assert comments
    assert re.search(r"\b[Ee]dit", " ".join(comments)), f"{path}: its first comment does not say what a user edits"


def test_images_have_no_host() -> None:
    texts = [(FOLDER / path).read_text() for path in YAML]
    names = re.findall(r"^ *-? *(?:image|newName|server|bundle): +([a-z][^\s{#]*)", "\n".join(texts), re.MULTILINE)
    assert {"torch-ext-server:latest", "torch-ext-bundle:latest"} <= set(names)
    for name in names:
        assert "/" not in name, f"{name}: images are named without a registry"
