"""Objects of deploy/kubernetes as kustomize and Helm render them, and their validation against Kubernetes' schemas.

Both renderers are programs of others, of the extra `kubernetes`; neither needs a cluster or a network. Helm runs in a
process of its own: its library is Go, whose runtime shall not live among the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
CHART = FOLDER / "chart"
CLOUDS = ("eks-graviton", "ack-yitian", "gke-axion", "aks-cobalt")

Objects = dict[tuple[str, str], dict[str, Any]]
"""By kind and name."""

_HELM = """
import json, sys
import helm_python as helm
asked = json.load(sys.stdin)
answer = {}
if "lint" in asked:
    answer = [helm.lint(asked["chart"], values) for values in asked["lint"]]
else:
    with helm.Chart.load(asked["chart"]) as chart:
        try:
            chart.validate_schema(asked["values"])
            answer["files"] = chart.render(asked["values"], name=asked["name"], namespace="default")
        except helm.HelmError as error:
            answer["error"] = str(error)
print(json.dumps(answer))
"""


_VALID: set[str] = set()


def read_yaml(text: str) -> list[Any]:
    """The documents of a stream, by libyaml where PyYAML has it: ten times as fast."""
    return list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def objects_of(text: str) -> Objects:
    """The objects of a stream of YAML."""
    found: Objects = {}
    for thing in read_yaml(text):
        if thing is not None:
            key = (thing["kind"], thing["metadata"]["name"])
            assert key not in found, f"{key} is there twice"
            found[key] = thing
    return found


def kustomize(folder: Path) -> Objects:
    """What `kubectl apply -k` would send."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return objects_of(done.stdout)


def helm(**asked: Any) -> Any:
    """Asks Helm's library: `values` and `name` to render, `lint` with several values to lint.

    Returns:
        The files by template or `error`; or what lint says of each.
    """
    done = subprocess.run(
        [sys.executable, "-c", _HELM],
        input=json.dumps({"chart": str(CHART), **asked}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HELM_CACHE_HOME": os.devnull, "HELM_CONFIG_HOME": os.devnull},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def chart(values: Mapping[str, Any] | None = None, name: str = "torch-ext") -> Objects:
    """What `helm install` would send."""
    answer = helm(values=dict(values or {}), name=name)
    assert "error" not in answer, answer["error"]
    return objects_of("\n---\n".join(answer["files"].values()))


def validate(thing: Mapping[str, Any]) -> None:
    """Checks an object of Kubernetes' own kinds strictly, against its newest schemas.

    Raises:
        kubernetes_validate.ValidationError: A field is unknown, missing, or of another type.
    """
    written = json.dumps(thing, sort_keys=True)
    if written not in _VALID:  # Most objects are those of every overlay.
        kubernetes_validate.validate(dict(thing), kubernetes_validate.latest_version(), strict=True)
        _VALID.add(written)
