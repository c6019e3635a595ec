"""`deploy serve` beside a plain Flask server and beside its own encoder called directly, in one run.

    python benchmarks/serving.py BUNDLE --model MODEL_DIR

32 keep-alive connections send one real text a request, as fast as the server answers. Every server runs alone, with
the same number of threads; rounds alternate. The client is one asyncio process on raw sockets: 15 to 30 us of CPU a
request, measured and printed, since it shares the machine.

Two ratios are what the project promises: requests/s against Flask and transformers in fp32 (at least 5, for bf16 where
the CPU multiplies bf16), and CPU time of the server process per text against the cheapest way of calling its encoder
directly on the same tokens (at most 1.3). CPU time is user and system time of the process by the kernel, over the
measured interval only.

`--peers` adds the servers of `benchmarks/peers`, each in an environment of its own that is made once (it fetches
packages of some gigabytes), and checks one vector of each against that of transformers.

`--frameworks` compares HTTP frameworks instead: the same request and answer, and no model behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import operator
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.closed_loop import Client, Load, processes  # noqa: E402
from benchmarks.peers import NATIVE, PEERS  # noqa: E402
from benchmarks.report import cpu_name  # noqa: E402
from deploy.options import bundle_folder, model_folder  # noqa: E402
from deploy.texts import sample  # noqa: E402

READY_S = 120.0
FLASK = "Flask, transformers fp32"
Result = TypeVar("Result")


def with_server(command: Sequence[str], action: Callable[[int, int], Result]) -> Result:
    """Starts a server that prints where it listens, runs the action with its port and process id, and stops it."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            match = None
            for line in process.stdout:  # Some servers write other things before.
                if (match := re.search(r"serving .* on http://127\.0\.0\.1:(\d+)", line)) is not None:
                    break
            if match is None:
                process.wait(READY_S)
                errors.seek(0)
                raise SystemExit(f"{' '.join(command)}: no start-up line\n{errors.read()[-2000:]}")
            return action(int(match[1]), process.pid)
        finally:
            started = [] if process.poll() is not None else list(processes(process.pid))
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            for pid in started:  # Some servers are several processes, and not all end with the first.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def measure(name: str, command: Sequence[str], requests: Sequence[bytes], connections: int, seconds: float) -> Load:
    """One round of one server."""

    def action(port: int, pid: int) -> Load:
        try:
            import uvloop

            run: Callable[[Any], Load] = uvloop.run
        except ModuleNotFoundError:
            run = asyncio.run
        return run(Client(port, requests, connections).run(name, pid, seconds))

    return with_server(command, action)


# The encoder, called directly. Runs in a process of its own: `--direct`.


def direct(bundle: Path, variant: str, threads: int, texts: Sequence[str], seconds: float) -> dict[str, float]:
    """CPU time per text of the encoder on ready token ids, by how many texts it gets at a time.

    Returns:
        `batch N`: us of CPU per text, pooling included, tokenisation not; `tokenize`: us per text; `mean_tokens`.
    """
    from deploy.server.process import settle_threads

    settle_threads(threads)
    import numpy as np
    import torch

    import torch_ext
    from deploy.bundle import load_manifest
    from deploy.server.service.tokens import TextTokenizer

    torch.set_num_threads(threads)
    manifest = load_manifest(bundle, verify=False)
    chosen = manifest.variant(variant)
    tokenizer = TextTokenizer.from_manifest(manifest)
    dtype: Any = chosen.dtype
    encoder = torch_ext.Encoder.load(manifest.path(chosen.file), dtype=dtype)
    begun_s = time.process_time()
    ids = [tokenizer.encode([text], True)[0] for text in texts]
    result = {"tokenize": 1e6 * (time.process_time() - begun_s) / len(ids)}
    result["mean_tokens"] = statistics.mean(map(len, ids))

    def run(batch: Sequence[Any]) -> None:
        cu_seqlens = torch.tensor([0, *np.cumsum([len(text) for text in batch])], dtype=torch.int32)
        hidden = encoder(torch.from_numpy(np.concatenate(batch)), cu_seqlens)
        torch_ext.pool(hidden, cu_seqlens, mode="mean", normalize=True)

    with torch.inference_mode():
        for size in (1, 8, 16, 32):
            for measured in (False, True):
                begun_s, cpu_begun_s, count = time.perf_counter(), time.process_time(), 0
                for start in range(0, len(ids), size):
                    run(ids[start : start + size])
                    count += len(ids[start : start + size])
                    if time.perf_counter() - begun_s > seconds:
                        break
                if measured:
                    result[f"batch {size}"] = 1e6 * (time.process_time() - cpu_begun_s) / count
    return result


# Frameworks, without a model. Each runs in a process of its own: `--framework NAME`.

FRAMEWORKS = ("plain ASGI", "Starlette", "FastAPI", "FastAPI, list of floats")


def serve_framework(name: str) -> None:
    """Serves one application on a free port: checks a request, answers 384 floats."""
    import msgspec
    import numpy as np
    import orjson
    import uvicorn

    from deploy.server.api.schemas import EmbedRequest
    from deploy.server.sockets import listen

    row = np.random.default_rng(0).standard_normal((1, 384), np.float32)
    decoder = msgspec.json.Decoder(EmbedRequest)

    def answer(body: bytes) -> bytes:
        decoder.decode(body)
        return orjson.dumps({"embeddings": row, "model": "none"}, option=orjson.OPT_SERIALIZE_NUMPY)

    app: Any
    if name == "plain ASGI":

        async def app(scope: Any, receive: Any, send: Any) -> None:
            body = answer((await receive())["body"])
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    elif name == "Starlette":
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import Response
        from starlette.routing import Route

        async def embed(request: Request) -> Response:
            return Response(answer(await request.body()), media_type="application/json")

        app = Starlette(routes=[Route("/api/embed", embed, methods=["POST"])])
    else:
        import fastapi
        import pydantic

        app = fastapi.FastAPI()
        body_type = pydantic.create_model(
            "Body", inputs=(str | list[str], ...), normalize=(bool | None, None), truncate=(bool, True)
        )

        async def embed_fastapi(body: Any) -> Any:
            if name == "FastAPI":
                return fastapi.Response(
                    orjson.dumps({"embeddings": row, "model": "none"}, option=orjson.OPT_SERIALIZE_NUMPY),
                    media_type="application/json",
                )
            return {"embeddings": row.tolist(), "model": "none"}

        embed_fastapi.__annotations__["body"] = body_type
        app.post("/api/embed")(embed_fastapi)
    sock = listen("127.0.0.1", 0)
    print(f"serving {name} on http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")).run(sockets=[sock])


# The report.


def multiplies_bf16() -> bool:
    """Whether products on this CPU take bf16 on both sides; else weights are widened to fp32, as with AVX2."""
    from torch_ext.runtime import isa_report

    return not isa_report()["linear_kernels"][0].startswith("gemm_f32_f32_")


def median(rounds: Sequence[Load]) -> Load:
    """Medians over the rounds of one server."""
    values = {
        key: statistics.median(getattr(load, key) for load in rounds) for key in asdict(rounds[0]) if key != "name"
    }
    return Load(name=rounds[0].name, **values)


def table(loads: Sequence[Load]) -> str:
    """One line per server."""
    lines = [f"{'server':34}{'requests/s':>11}{'p50 ms':>9}{'p95 ms':>9}{'CPU us/text':>13}{'client us':>11}"]
    lines += [
        f"{load.name:34}{load.requests_per_s:11.1f}{load.p50_ms:9.1f}{load.p95_ms:9.1f}{load.cpu_us:13.0f}"
        f"{load.client_cpu_us:11.0f}"
        for load in loads
    ]
    return "\n".join(lines)


def main() -> int:
    """Runs everything; the exit code is 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", nargs="?", type=bundle_folder, help="folder written by python -m deploy export")
    parser.add_argument(
        "--model", type=model_folder, help="the model's folder, for the Flask server; without it that is left out"
    )
    parser.add_argument("--variants", default="torch_ext-bf16", help="comma-separated (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each server (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=32, help="of the client (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="per server and round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=2000, help="how many different texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which texts (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "serving.json",
        help="(default: benchmarks/results/serving.json)",
    )
    parser.add_argument("--peers", action="store_true", help="other servers, too; needs --model and packages")
    parser.add_argument("--frameworks", action="store_true", help="compare HTTP frameworks instead")
    parser.add_argument("--framework", choices=FRAMEWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--direct", metavar="VARIANT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    texts = sample(arguments.texts, arguments.seed)
    if arguments.framework:
        serve_framework(arguments.framework)
        return 0
    if arguments.direct:
        print(json.dumps(direct(arguments.bundle, arguments.direct, arguments.threads, texts, arguments.seconds)))
        return 0

    own = [sys.executable, str(Path(__file__).resolve())]
    commands: dict[str, list[str]] = {}
    if arguments.frameworks:
        commands = {name: [*own, "--framework", name] for name in FRAMEWORKS}
    elif arguments.bundle is None:
        parser.error("BUNDLE is missing: make one with python -m deploy export MODEL -o BUNDLE")
    else:
        if arguments.model:
            plain = str(ROOT / "scripts" / "plain_server.py")
            commands[FLASK] = [sys.executable, plain, str(arguments.model)]
        for variant in arguments.variants.split(","):
            serve = [sys.executable, "-m", "deploy", "serve", str(arguments.bundle), "--variant", variant]
            commands[f"deploy serve {variant}"] = serve
        commands = {
            name: [*command, "--port", "0", "--threads", str(arguments.threads)] for name, command in commands.items()
        }

    requests = dict.fromkeys(commands, NATIVE.requests(texts))
    if arguments.peers:
        if not arguments.model or arguments.bundle is None:
            parser.error("--peers needs BUNDLE and --model MODEL_DIR")
        text = "Servers of encoders, compared."
        flask_command = commands[FLASK]
        expected = with_server(flask_command, lambda port, pid: NATIVE.embed(port, text))
        for peer in PEERS:
            command = peer.command(str(arguments.model), str(arguments.bundle))
            commands[peer.name] = [*command, "--port", "0", "--threads", str(arguments.threads)]
            requests[peer.name] = peer.api.requests(texts)
            found = with_server(commands[peer.name], lambda port, pid, api=peer.api: api.embed(port, text))
            if (cosine := sum(map(operator.mul, found, expected))) < 0.999:
                raise SystemExit(f"{peer.name}: expected the vector of transformers, got one with cosine {cosine:.4f}")
    rounds: dict[str, list[Load]] = {name: [] for name in commands}
    for number in range(arguments.rounds):
        for name, command in commands.items():
            load = measure(name, command, requests[name], arguments.connections, arguments.seconds)
            rounds[name].append(load)
            print(f"round {number + 1}: {name}: {load.requests_per_s:.1f} requests/s", file=sys.stderr)
    loads = {name: median(found) for name, found in rounds.items()}
    report: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "command": " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
        "servers": [asdict(load) for load in loads.values()],
        "rounds": {name: [asdict(load) for load in found] for name, found in rounds.items()},
    }
    print(
        f"{report['cpu']}, {report['cores']} cores; {arguments.connections} connections, one text a request, "
        f"{arguments.threads} threads, {arguments.rounds} rounds of {arguments.seconds:g} s"
    )
    print(table(list(loads.values())))
    broken = False
    for variant in [] if arguments.frameworks else arguments.variants.split(","):
        ours = loads[f"deploy serve {variant}"]
        if (flask := loads.get(FLASK)) is not None:
            speedup = ours.requests_per_s / flask.requests_per_s
            promised = variant == "torch_ext-bf16" and multiplies_bf16()
            print(f"{variant}: {speedup:.1f}x the requests/s of Flask{' (promised: at least 5)' if promised else ''}")
            report[f"{variant} speedup over Flask"] = speedup
            broken |= promised and speedup < 5
        if arguments.peers:
            best = max((loads[peer.name] for peer in PEERS), key=lambda load: load.requests_per_s)
            report[f"{variant} speedup over {best.name}"] = speedup = ours.requests_per_s / best.requests_per_s
            print(f"{variant}: {speedup:.2f}x the requests/s of the best peer, {best.name}")
        if variant in ("torch_ext-bf16", "torch_ext-fp32"):
            command = [*own, str(arguments.bundle), "--direct", variant, "--threads", str(arguments.threads)]
            command += ["--texts", str(arguments.texts), "--seed", str(arguments.seed), "--seconds", "4"]
            found = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
            report[f"{variant} called directly"] = found
            way, least_us = min(
                (item for item in found.items() if item[0].startswith("batch")), key=lambda item: item[1]
            )
            ratio = ours.cpu_us / least_us
            print(f"{variant} called directly, CPU us/text ({found['mean_tokens']:.1f} tokens on average):")
            print("  " + ", ".join(f"{key} {value:.0f}" for key, value in found.items() if key != "mean_tokens"))
            print(f"{variant}: server / direct ({way}) = {ratio:.2f}x the CPU per text (promised: at most 1.3)")
            report[f"{variant} CPU ratio"] = ratio
            broken |= ratio > 1.3
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    output = arguments.output.with_name("frameworks.json") if arguments.frameworks else arguments.output
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {output}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
