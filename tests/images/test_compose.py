"""The compose file, read without an engine, and its commands against the programs that get them."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "dockerfiles" / "compose.yaml"
SERVICES = ("server", "locust-master", "locust-worker", "prometheus", "grafana")
MONITORING = ROOT / "dockerfiles" / "monitoring"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())


def default(value: str) -> str:
    """The value with every variable replaced by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def test_services(compose: dict[str, Any]) -> None:
    assert tuple(compose["services"]) == SERVICES
    assert not any("build" in service for service in compose["services"].values())


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_hardened_and_limited(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["init"] is True
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    assert float(default(str(service["cpus"]))) > 0
    assert re.fullmatch(r"\d+[mg]", default(service["mem_limit"]))


def test_load_goes_to_this_machine_only(compose: dict[str, Any]) -> None:
    for name in ("locust-master", "locust-worker"):
        service = compose["services"][name]
        assert service["network_mode"] == "service:server"
        assert service["depends_on"]["server"] == {"condition": "service_healthy"}
        for argument in service["command"]:
            host = re.fullmatch(r"--(?:host|master-host|master-bind-host)=(?:http://)?([^:]+)(?::\d+)?", argument)
            assert host is None or host[1] == "127.0.0.1"
    assert "--host=http://127.0.0.1:8000" in compose["services"]["locust-master"]["command"]
    assert all(port.startswith("127.0.0.1:") for port in compose["services"]["server"]["ports"])


def test_the_server_may_drain_before_it_is_killed(compose: dict[str, Any]) -> None:
    from deploy.server.limits.bounds import Settings

    settings = Settings()
    grace_s = int(compose["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.drain_delay_s + settings.drain_timeout_s


def test_the_server_knows_its_options(compose: dict[str, Any]) -> None:
    from deploy.server.cli import _parser
    from deploy.server.limits.bounds import Settings
    from deploy.server.variants.choice import AUTO

    arguments = _parser().parse_args([default(word) for word in compose["services"]["server"]["command"]])
    assert str(arguments.model) == "/bundle"
    assert arguments.variant == AUTO
    assert Settings().port == 8000
    assert compose["services"]["server"]["ports"][0].endswith(":8000")


def test_monitoring_is_asked_for_and_stays_on_this_machine(compose: dict[str, Any]) -> None:
    for name in ("prometheus", "grafana"):
        service = compose["services"][name]
        assert service["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source, _, options = volume.partition(":")
            assert (PATH.parent / source).exists(), source
            assert options.endswith(":ro")
    scraped = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"]
    assert scraped == [{"targets": ["server:8000"]}]
    source = yaml.safe_load((MONITORING / "datasource.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"


def test_the_dashboard_asks_for_metrics_that_the_server_has() -> None:
    from deploy.server.metrics import Metrics

    metrics = Metrics()
    metrics.gauges(lambda: 0, lambda: 0.0, lambda: 0, lambda: True)
    metrics.serves("m", "v", "t")
    metrics.answered("/embed", 200, 0.1, "native")
    metrics.stages(0.1, 0.1, 0.1)
    metrics.batch(1, 2, 2)
    metrics.refused("queue_full")
    metrics.cached("hit", 1)
    metrics.cache(lambda: 0)
    served = metrics.render().decode()
    known = set(re.findall(r"^(\w+)(?:\{| )", served, re.MULTILINE))
    labels = set(re.findall(r'[{,](\w+)="', served)) | {"instance"}
    dashboard = json.loads((MONITORING / "dashboards" / "server.json").read_text())
    datasource = yaml.safe_load((MONITORING / "datasource.yaml").read_text())["datasources"][0]["uid"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    asked = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == datasource
        for target in panel["targets"]:
            names = set(re.findall(r"\b(?:serve|process)_\w+", target["expr"]))
            assert names <= known, f"{panel['title']}: the server has no {names - known}"
            assert names
            used = re.findall(r"\bby \(([^)]*)\)", target["expr"]) + re.findall(
                r"\{\{(\w+)\}\}", target["legendFormat"]
            )
            assert {name.strip() for words in used for name in words.split(",")} <= labels, panel["title"]
            asked |= names
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known if name.startswith("serve_")}
    assert ours == {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked if name.startswith("serve_")}


def locust(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Locust with this repository's file."""
    program = "import gevent; gevent.reinit(); from locust.main import main; main()"  # its loop is from before the fork
    command = ["-c", program, "-f", str(ROOT / "loadtest" / "locustfile.py"), *arguments]
    return warm.python("locust.main").run(*command, timeout=120, cwd=ROOT)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_the_locust_master_knows_its_options(compose: dict[str, Any], tmp_path: Path) -> None:
    port = free_port()
    arguments = [
        default(argument).replace("/reports", str(tmp_path)).replace(":8000", f":{port}")
        for argument in compose["services"]["locust-master"]["command"]
    ]
    result = locust(*arguments, f"--master-bind-port={free_port()}")
    # It has read every option, and finds no server.
    assert result.returncode == 2
    assert f"no answer from http://127.0.0.1:{port}/ready" in result.stderr


def test_locust_workers_know_their_options(compose: dict[str, Any]) -> None:
    known = set(re.findall(r"--[a-z][a-z0-9-]*", locust("--help").stdout))
    assert {argument.split("=")[0] for argument in compose["services"]["locust-worker"]["command"]} <= known
