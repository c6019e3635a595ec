"""Popular clients against served bundles: `python tests/clients/run.py [FOLDER]`.

Makes an environment of the clients' own in FOLDER (kept, so that a second run is quick), exports small random models,
serves each, and runs `clients.py` in that environment. Needs a package index; `make test` does not run it. Exit code:
how many calls failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODELS = {
    "feature-extraction": {},
    "text-classification": {},
    "rerank": {"num_labels": 1},
    "fill-mask": {},
    "token-classification": {},
    "question-answering": {},
}


def environment(folder: Path) -> Path:
    """The Python that has the clients; made once for these requirements."""
    wanted = (HERE / "requirements.txt").read_text(encoding="utf-8")
    python, made = folder / "bin" / "python", folder / "made-of.txt"
    if not made.exists() or made.read_text(encoding="utf-8") != wanted:
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        subprocess.run([*install, str(HERE / "requirements.txt")], check=True)
        made.write_text(wanted, encoding="utf-8")
    return python


def bundle(folder: Path, name: str) -> Path:
    """A small random model, exported."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "deploy")]
    from conftest import make_tiny_model

    from deploy.export.cli import main

    task = "text-classification" if name == "rerank" else name
    model = make_tiny_model(folder / f"{name}-model", "bert", task, **MODELS[name])
    arguments = [str(model), "-o", str(folder / name), "--variants", "torch_ext-fp32", "--name", f"tiny/{name}"]
    if main([*arguments, "--max-texts", "8", "--speed-seconds", "0", "--quiet"]) != 0:
        raise RuntimeError(f"{name}: the export failed")
    return folder / name


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[str]:
    """A server of a bundle; gives its address."""
    command = [sys.executable, "-m", "deploy", "serve", str(folder), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{folder.name}: the server did not start")
        yield line.split(" on ")[1].split()[0]
    finally:
        process.terminate()
        process.wait(30)


def make_key(file: Path) -> str:
    """An API key for one request a minute, in a new file."""
    command = [
        sys.executable,
        "-m",
        "deploy",
        "key",
        "--file",
        str(file),
        "--name",
        "few",
        "--requests-per-minute",
        "1",
    ]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> int:
    """Runs all clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="keeps the environment")
    kept: Path | None = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        work = Path(temporary)
        python = environment(work / "environment" if kept is None else kept)
        addresses = {name: stack.enter_context(served(bundle(work, name))) for name in MODELS}
        keys = work / "keys"
        environment_of_clients = {**os.environ, "CLIENTS_KEY": make_key(keys)}
        embedder = work / "feature-extraction"
        addresses["keys"] = stack.enter_context(served(embedder, "--api-keys-file", str(keys)))
        command = [str(python), str(HERE / "clients.py"), json.dumps(addresses)]
        return subprocess.run(command, env=environment_of_clients).returncode


if __name__ == "__main__":
    sys.exit(main())
