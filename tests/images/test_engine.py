"""Built images, run: healthy, hardened, the same answers on both architectures, a load test by compose.

Needs images and a bundle of a feature-extraction model, named by environment variables; ``.ci/run images`` makes them::

    TORCH_EXT_IMAGE_AMD64 TORCH_EXT_IMAGE_ARM64 TORCH_EXT_IMAGE_LOADTEST   tags
    TORCH_EXT_IMAGE_ONNX                                                   tag, of arm64 with EXTRAS="serve onnx"
    TORCH_EXT_IMAGE_ALL                                                    tag, of server-all for amd64
    TORCH_EXT_BUNDLE, TORCH_EXT_MODEL                                      folders
    DOCKER, DOCKER_COMPOSE                                                 commands
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.texts import sample

from .engine import HARDENED, Container, docker, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
ARCHES = ("amd64", "arm64")
# Emulation takes about half a second a token.
TEXTS = [text for text in sample(600, seed=11) if len(text) < 60][:10]

CPUINFO = """\
processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


def setting(name: str) -> str:
    """An environment variable that .ci/run sets."""
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"{name} is not set: .ci/run images builds what is needed and sets it")
    return value


def image(arch: str) -> str:
    return setting(f"TORCH_EXT_IMAGE_{arch.upper()}")


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def embeddings(container: Container) -> list[list[float]]:
    """Embeddings of TEXTS, in two requests."""
    half = len(TEXTS) // 2
    return [
        vector
        for texts in (TEXTS[:half], TEXTS[half:])
        for vector in container.post("/api/embed", {"inputs": texts})["embeddings"]
    ]


def of_this_machine(variant: str) -> list[list[float]]:
    """Embeddings that the image of the common architecture computes."""
    with serving(image("amd64"), "amd64", setting("TORCH_EXT_BUNDLE"), "--variant", variant) as container:
        container.wait_until_healthy(120)
        return embeddings(container)


@pytest.fixture(scope="module")
def fp32() -> list[list[float]]:
    return of_this_machine("torch_ext-fp32")


@pytest.fixture(scope="module")
def bf16() -> list[list[float]]:
    return of_this_machine("torch_ext-bf16")


@pytest.fixture(scope="module", params=ARCHES)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, Container]]:
    """A healthy server, on each architecture; at the end it has to stop in good order."""
    arch = request.param
    variant = ("--variant", "torch_ext-bf16")
    with serving(image(arch), arch, setting("TORCH_EXT_BUNDLE"), *variant, options=["--cpus=1"]) as container:
        print(f"{arch} healthy after {container.wait_until_healthy(300):.0f} s")
        yield arch, container
        exit_code, seconds = container.stop(40)
        assert exit_code == 0, container.logs()
        assert seconds < 30


def test_same_embeddings(server: tuple[str, Container], fp32: list[list[float]], bf16: list[list[float]]) -> None:
    arch, container = server
    answers = embeddings(container)
    worst, worst_fp32 = min(map(cosine, answers, bf16)), min(map(cosine, answers, fp32))
    print(f"{arch}: worst cosine to amd64 {worst:.6f}, to amd64 in fp32 {worst_fp32:.6f}")
    assert worst >= 0.9999
    assert worst_fp32 >= 0.9995


def test_what_it_says_of_itself(server: tuple[str, Container]) -> None:
    arch, container = server
    started = re.search(r"variant=(\S+) threads=(\d+) isa=(\S+)", container.logs())
    assert started is not None, container.logs()
    assert started[1] == "torch_ext-bf16"
    assert "(by --variant)" in container.logs()
    assert started[2] == "1", "the container's CPU quota is 1"
    if arch == "arm64":
        assert started[3] == "neon_i8mm", "the emulated CPU has bf16 and i8mm"
    assert container.get("/ready")[0] == 200
    assert container.get("/metrics")[0] == 200
    assert container.get("/docs")[0] == 200


def test_it_runs_without_rights(server: tuple[str, Container]) -> None:
    _, container = server
    assert docker("exec", container.name, "python", "-I", "-S", "-c", "import os; print(os.getuid(), os.getgid())") == (
        "65532 65532"
    )
    write = "import sys\ntry: open('/app/x', 'w')\nexcept OSError: sys.exit(3)"
    with pytest.raises(RuntimeError, match="exit code 3"):
        docker("exec", container.name, "python", "-I", "-S", "-c", write)


def test_wrong_requests_get_an_answer(server: tuple[str, Container]) -> None:
    _, container = server
    for body in ([], {"inputs": []}, {"inputs": 3}, {"inputs": ["\ud800"]}):
        with pytest.raises(Exception, match=r"HTTP Error 4\d\d"):
            container.post("/api/embed", body)
    assert len(container.post("/api/embed", {"inputs": "ok"})["embeddings"]) == 1


def test_arm64_without_bf16(fp32: list[list[float]]) -> None:
    """Graviton2's cores."""
    options = ["--env=QEMU_CPU=neoverse-n1"]
    variant = ("--variant", "torch_ext-bf16")
    with serving(image("arm64"), "arm64", setting("TORCH_EXT_BUNDLE"), *variant, options=options) as container:
        container.wait_until_healthy(300)
        assert "isa=neon_dotprod " in container.logs()
        vectors = container.post("/api/embed", {"inputs": TEXTS[:3]})["embeddings"]
    assert min(map(cosine, vectors, fp32)) >= 0.9995


def test_without_a_variant_it_measures(fp32: list[list[float]]) -> None:
    """Hardened as it is: a file system that is read only, and a user without a home."""
    with serving(image("amd64"), "amd64", setting("TORCH_EXT_BUNDLE"), options=["--cpus=1"]) as container:
        container.wait_until_healthy(120)
        status, body = container.get("/info")
        info = json.loads(body)
        assert status == 200
        assert info["chosen_by"] == "measurement", container.logs()
        assert info["variant"] in {item["variant"] for item in info["candidates"]}
        assert f"variant={info['variant']} " in container.logs()
        assert min(map(cosine, embeddings(container), fp32)) >= 0.95
        assert container.stop(40)[0] == 0


def test_arm64_onnx_int8(fp32: list[list[float]], tmp_path: Path) -> None:
    # QEMU before 8.1 shows the host's /proc/cpuinfo, and ONNX Runtime 1.32 crashes on one that is not Arm's.
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO)
    options = ["--env=QEMU_CPU=neoverse-n1", f"--volume={cpuinfo}:/proc/cpuinfo:ro", "--cpus=1"]
    bundle = setting("TORCH_EXT_BUNDLE")
    with serving(image("onnx"), "arm64", bundle, "--variant", "onnx-int8", options=options) as container:
        container.wait_until_healthy(300)
        vectors = container.post("/api/embed", {"inputs": TEXTS[:3]})["embeddings"]
    assert min(map(cosine, vectors, fp32)) >= 0.95


def test_a_missing_bundle_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with serving(image("amd64"), "amd64", str(tmp_path)) as container:
        docker("wait", container.name)
        assert container.state()["ExitCode"] == 2
        assert "manifest.json" in container.logs()


@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_in_the_image(arch: str) -> None:
    tag = image(arch)
    record = json.loads(docker("image", "inspect", tag))[0]
    assert (record["Os"], record["Architecture"]) == ("linux", arch)
    assert record["Config"]["User"] == "65532:65532"
    assert record["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    print(f"{arch}: {record['Size'] / 1e6:.1f} MB without a bundle; MiniLM in bf16 has 45 MB")
    # The base of this machine's architecture can build, too, and is larger.
    assert record["Size"] < (150e6 if arch == "arm64" else 220e6)
    script = (
        "import importlib.util as u, os;"
        "absent = 'torch', 'numpy', 'transformers', 'optimum', 'onnxruntime', 'safetensors', 'huggingface_hub';"
        "print([n for n in absent if u.find_spec(n)]);"
        "print(os.path.realpath(u.find_spec('torch_ext').origin)); import torch_ext.runtime"
    )
    output = docker("run", "--rm", f"--platform=linux/{arch}", "--entrypoint=python", tag, "-c", script)
    present, origin = output.splitlines()[-2:]
    assert present == "[]"
    assert origin == "/app/extension/torch_ext/__init__.py", "the wheel's, not a source folder's"
    assert not record["Config"].get("Volumes")


def test_doctor_in_the_arm64_image() -> None:
    name = f"torch-ext-test-{uuid.uuid4().hex[:12]}"
    try:
        # 0: all well, 1: something is set wrong (emulation is reported); anything else is a crash.
        output = docker(
            *("run", f"--name={name}", "--platform=linux/arm64", "--entrypoint=python", image("arm64")),
            *("-m", "torch_ext.doctor", "--json"),
            check=False,
        )
        assert int(docker("inspect", "--format={{.State.ExitCode}}", name)) in (0, 1), output
    finally:
        docker("rm", "--force", name)
    assert "neon_i8mm" in output


BAR = ("--user=12345", "--cpus=1.5", "--memory=1g")


@pytest.mark.parametrize("arch", ARCHES)
def test_hardened_it_takes_one_thread(arch: str) -> None:
    """As another user than the image's, too, on 1.5 CPUs: rounded down."""
    variant = ("--variant", "torch_ext-bf16")
    with serving(image(arch), arch, setting("TORCH_EXT_BUNDLE"), *variant, options=BAR) as container:
        container.wait_until_healthy(300)
        assert "entry point: threads=1 (quota of 1.5, " in container.logs()
        assert " threads=1 isa=" in container.logs()
        assert len(container.post("/api/embed", {"inputs": "ok"})["embeddings"]) == 1
        exit_code, seconds = container.stop(40)
        print(f"{arch}: stopped after {seconds:.1f} s")
        assert exit_code == 0, container.logs()


def until_printed(container: Container, text: str) -> None:
    """Waits for a line of the container's log."""
    wait_for(lambda: text in container.logs(), 300)


# How a start goes on, by what it has printed.
STARTS: dict[str, Callable[[Container], None]] = {
    "created": lambda container: None,
    "python": lambda container: time.sleep(0.3),
    "imports": lambda container: until_printed(container, "entry point: "),
    "serves": lambda container: until_printed(container, " on http://"),
}
BAR_S = 2.0
"""How long a stop may take beside the drain and the engine's own time."""
IDLE_S = 1.0
"""A drain keeps connections open for so long: a request may be on its way."""
HALF_S = 2.0
"""How long a drain waits for the rest of a request."""
ANSWER_S = 25.0
"""How long a drain waits for answers."""


@pytest.fixture(scope="module")
def engine_s() -> float:
    """How long the engine itself takes to stop a container whose program ends at once: on a busy machine, seconds."""
    name = f"torch-ext-test-{uuid.uuid4().hex[:12]}"
    docker("run", "--detach", f"--name={name}", *HARDENED, "--entrypoint=/app/init", image("amd64"), "sleep", "1000")
    try:
        times = []
        for _ in range(3):
            times.append(Container(name, "").stop(40)[1])
            docker("start", name)
    finally:
        docker("rm", "--force", name)
    print(f"the engine takes {max(times):.1f} s")
    return max(times)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("start", STARTS)
def test_it_can_be_stopped_while_it_starts(arch: str, start: str, engine_s: float) -> None:
    """From its first instruction on; at first Python has no handler, then it loads, then it serves."""
    variant = ("--variant", "torch_ext-bf16")
    with serving(image(arch), arch, setting("TORCH_EXT_BUNDLE"), *variant, options=BAR) as container:
        STARTS[start](container)
        exit_code, seconds = container.stop(40)
        print(f"{arch}, {start}: stopped in {seconds:.1f} s")
        assert exit_code == 0, container.logs()
        assert seconds < engine_s + BAR_S + IDLE_S, "SIGTERM was lost"


@pytest.mark.parametrize("arch", ARCHES)
def test_it_can_be_stopped_while_it_loads(arch: str, engine_s: float) -> None:
    """At moments that no line of the log tells: each after a part of the time that a start takes here."""
    variant = ("--variant", "torch_ext-bf16")
    with serving(image(arch), arch, setting("TORCH_EXT_BUNDLE"), *variant, options=BAR) as container:
        started_s = time.monotonic()
        until_printed(container, " on http://")
        start_s = time.monotonic() - started_s
        container.stop(40)
        for part in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
            docker("start", container.name)
            time.sleep(part * start_s)
            exit_code, seconds = container.stop(40)
            print(f"{arch}, {part:.0%} of {start_s:.1f} s: stopped in {seconds:.1f} s")
            assert exit_code == 0, container.logs()
            assert seconds < engine_s + BAR_S + IDLE_S


class Clients:
    """What clients do while a server is stopped.

    Attributes:
        answers: Of the requests that are sent whole: vectors, or the name of an error.
    """

    def __init__(self, container: Container) -> None:
        self.answers: list[int | str] = []
        host, port = container.url.removeprefix("http://").split(":")
        self._address = (host, int(port))
        self._container = container
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def connect(self, data: bytes = b"") -> None:
        """Opens a connection and sends something."""
        sock = socket.create_connection(self._address)
        sock.sendall(data)
        self._sockets.append(sock)

    def send_parts(self) -> None:
        """Requests that stop in the first line, in the headers, before the body, in the body."""
        request = b'POST /api/embed HTTP/1.1\r\nhost: x\r\ncontent-length: 17\r\n\r\n{"inputs": "abc"}'
        for end in (9, 40, request.index(b"{"), len(request) - 5):
            self.connect(request[:end])

    def ask(self) -> None:
        """Four requests: one is computed, the others wait. Short ones: emulation takes half a second a token."""

        def one() -> None:
            try:
                self.answers.append(len(self._container.post("/api/embed", {"inputs": "ok"})["embeddings"]))
            except OSError as error:
                self.answers.append(type(error).__name__)

        self._threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in self._threads:
            thread.start()
        time.sleep(0.5)

    def end(self) -> None:
        """Waits for answers, and closes connections."""
        for thread in self._threads:
            thread.join(60)
        for sock in self._sockets:
            sock.close()


# What clients do, and how long the drain may then take.
STATES: dict[str, tuple[Callable[[Clients], None], float]] = {
    "idle": (Clients.connect, IDLE_S),
    "half-sent": (Clients.send_parts, HALF_S),
    "loaded": (Clients.ask, ANSWER_S),
    "told twice": (Clients.send_parts, HALF_S),
}


@pytest.mark.parametrize("arch", ARCHES)
def test_it_can_be_stopped_in_any_state(arch: str, engine_s: float) -> None:
    """One container, started again after each stop: an engine keeps its name, but not its port."""
    variant = ("--variant", "torch_ext-bf16", "--max-queue-ms", "60000")
    with serving(image(arch), arch, setting("TORCH_EXT_BUNDLE"), *variant, options=BAR) as first:
        for number, (state, (begin, drain_s)) in enumerate(STATES.items()):
            if number:
                docker("start", first.name)
            port = docker("port", first.name, "8000/tcp").splitlines()[0].rsplit(":", 1)[1]
            container = Container(first.name, f"http://127.0.0.1:{port}")
            container.wait_until_healthy(300)
            clients = Clients(container)
            begin(clients)
            if state == "told twice":
                docker("kill", "--signal=TERM", container.name)
            exit_code, seconds = container.stop(40)
            clients.end()
            print(f"{arch}, {state}: stopped in {seconds:.1f} s, answers {clients.answers}")
            assert exit_code == 0, container.logs()
            assert seconds < engine_s + BAR_S + drain_s
            if state == "loaded":
                assert clients.answers == [1] * 4, "what was accepted is answered"


def test_bill_of_materials() -> None:
    tag = image("arm64")
    read = ("--entrypoint=python", tag, "-c", "print(open('/app/sbom.cdx.json').read())")
    bill = json.loads(docker("run", "--rm", "--platform=linux/arm64", *read))
    names = {item["name"] for item in bill["components"] if item["purl"].startswith("pkg:pypi/")}
    assert bill["bomFormat"] == "CycloneDX"
    assert {"torch-ext", "tokenizers", "uvicorn"} <= names
    assert not {"torch", "numpy", "transformers"} & names


def test_server_all_exports_once_and_serves() -> None:
    """A model's folder, with the options of TEI; the bundle stays in the volume, and the second start is quick."""
    tag, volume = setting("TORCH_EXT_IMAGE_ALL"), f"torch-ext-test-{uuid.uuid4().hex[:12]}"
    size = json.loads(docker("image", "inspect", tag))[0]["Size"]
    print(f"server-all: {size / 1e6:.0f} MB")
    assert size < 1.2e9
    options = [
        *BAR[:1],
        f"--volume={setting('TORCH_EXT_MODEL')}:/model:ro",
        f"--volume={volume}:/data",
        "--env=HF_HUB_OFFLINE=1",
        "--env=EXPORT_ARGS=--max-texts 16 --speed-seconds 0 --variants torch_ext-bf16",
    ]
    try:
        with serving(tag, "amd64", None, "--model-id", "/model", options=options) as container:
            container.wait_until_healthy(600)
            assert "exporting /model into /data/bundles/" in container.logs()
            assert len(container.post("/embed", {"inputs": ["a", "b"]})) == 2
            assert container.stop(40)[0] == 0
        with serving(tag, "amd64", None, "--model-id", "/model", options=options) as container:
            print(f"server-all, second start: healthy after {container.wait_until_healthy(120):.0f} s")
            assert "exporting" not in container.logs()
            assert container.stop(40)[0] == 0
        # Stopped while it exports.
        with serving(tag, "amd64", None, "--model-id", "/model", "--pooling", "cls", options=options) as container:
            wait_for(lambda: "exporting" in container.logs(), 60)
            exit_code, seconds = container.stop(20)
            assert exit_code == 0, container.logs()
            assert seconds < 10
    finally:
        docker("volume", "rm", "--force", volume)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come"
        time.sleep(0.2)


def test_load_test_by_compose(tmp_path: Path) -> None:
    compose = [*shlex.split(setting("DOCKER_COMPOSE")), "-f", str(ROOT / "dockerfiles" / "compose.yaml")]
    environment = {
        **os.environ,
        "SERVER_IMAGE": image("amd64"),
        "LOADTEST_IMAGE": setting("TORCH_EXT_IMAGE_LOADTEST"),
        "BUNDLE": setting("TORCH_EXT_BUNDLE"),
        "SERVER_PORT": "0",
        "LOCUST_USERS": "8",
        "LOCUST_RUN_TIME": "25s",
        "SLO_P95_MS": "10000",
        "SLO_ERROR_RATE": "0",
        "COMPOSE_PROJECT_NAME": f"torch-ext-test-{uuid.uuid4().hex[:8]}",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*compose, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    try:
        up = run("up", "--detach")
        assert up.returncode == 0, up.stderr + run("logs").stdout
        waited = run("wait", "locust-master")
        logs = run("logs", "--no-log-prefix", "locust-master").stdout
        assert waited.returncode == 0, logs
        copied = run("cp", "locust-master:/reports/.", str(tmp_path))
        assert copied.returncode == 0, copied.stderr
        names = {path.name for path in tmp_path.iterdir()}
        assert {"load.html", "load_stats.csv"} <= names
        rows = (tmp_path / "load_stats.csv").read_text().splitlines()
        total = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
        assert int(total["Request Count"]) >= 8
        assert int(total["Failure Count"]) == 0
    finally:
        run("down", "--volumes", "--timeout", "40")
