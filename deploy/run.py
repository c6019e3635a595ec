"""`python -m deploy run`: exports a model once, into a folder that keeps bundles, then serves it.

What image `server-all` starts: it takes the options of `serve`, and those of text-embeddings-inference. The exporter
runs in a process of its own, so that the server holds neither torch nor its memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TextIO

from .bundle import MANIFEST_FILE
from .server.cli import parse
from .server.main import main as serve
from .server.tei_options import POOLINGS

__all__ = ["main"]

BUNDLES_VARIABLE = "BUNDLES"
EXPORT_VARIABLE = "EXPORT_ARGS"
VARIANTS = "torch_ext-bf16,torch_ext-int8,torch_ext-fp32"
"""What is exported unless EXPORT_ARGS says so: the image has no ONNX."""

STOP_S = 1.5
"""How long an exporter that is told to stop has to remove what it wrote, before it is killed."""

# Options of TEI that say how a model is fetched: the server alone has no use for them.
_REVISION, _TOKENS, _CACHE = "--revision", ("--hf-token", "--hf-api-token"), "--huggingface-hub-cache"

USAGE = """\
usage: python -m deploy run MODEL [OPTION ...]
       python -m deploy run --model-id MODEL [OPTION ...]

Export a model once, into a folder of BUNDLES, and serve it. MODEL is an id on the hub, or a model's folder; a bundle
is served as it is. Options are those of python -m deploy serve; --revision, --pooling,
--task, --hf-token and --huggingface-hub-cache hold for the export.

environment:
  BUNDLES      folder that keeps bundles (default: bundles)
  EXPORT_ARGS  more options of python -m deploy export, such as --accuracy 0.998
  MODEL_ID ... variables of text-embeddings-inference
"""


def take(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Takes an option with its value out of arguments.

    Args:
        argv: Arguments.
        name: Of the option, in full.

    Returns:
        Its last value, None if it is not given, and the other arguments.
    """
    value: str | None = None
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, value)
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def bundle_name(model: str, options: Sequence[str]) -> str:
    """The folder of a model's bundle: its name, and what the bundle depends on.

    Args:
        model: An id on the hub, or a folder; of a folder, sizes and times of its files count.
        options: Of the export.
    """
    folder = Path(model)
    files: list[tuple[str, int, int]] = []
    if folder.is_dir():
        files = sorted(
            (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in folder.rglob("*")
            if path.is_file()
        )
    digest = hashlib.sha256(repr((model, list(options), files)).encode()).hexdigest()[:12]
    words = re.sub(r"[^\w.-]+", "--", model.strip("/")).lstrip(".-") or "model"
    return f"{words[-80:]}-{digest}"


def with_bundle(argv: Sequence[str], model: str, bundle: str) -> list[str]:
    """Arguments of `serve` with the bundle in place of the model, however it was named."""
    for index, word in enumerate(argv):
        if word != model or (index and argv[index - 1] == "--model-id"):
            continue
        replaced = [*argv[:index], bundle, *argv[index + 1 :]]
        if parse(replaced).model == bundle:
            return replaced
    return [bundle, *argv]  # The model came by --model-id or MODEL_ID; MODEL goes before both.


class _Stopped(BaseException):
    """A signal asked this process to end while the exporter ran."""


def _export(model: str, target: Path, options: Sequence[str]) -> int | None:
    """Runs the exporter.

    Returns:
        Its exit code; None: a signal asked this process to end, and the exporter has ended.
    """
    command = [sys.executable, "-m", "deploy", "export", model, "-o", str(target), *options]
    process: subprocess.Popen[bytes] | None = None
    asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        first, asked = not asked, True
        if first and process is not None:
            raise _Stopped

    # Before there is a process: one that has just begun must not outlive this one.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(command, stdout=sys.stderr)
        if asked:
            raise _Stopped
        code = process.wait()
    except _Stopped:
        assert process is not None
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path leads to the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _opened(path: Path, made: list[Path]) -> TextIO:
    """Opens a file, and makes it and its folders if needed; notes down folders that were not there."""

    def opened() -> TextIO:
        made.extend(folder for folder in path.parents if not folder.exists())
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a")

    for _ in range(99):
        # Another process may have removed a folder, which was empty, in this moment.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            return opened()
    return opened()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which goes at the end, and so do folders that were made for it and have stayed empty.

    Raises:
        OSError: The file cannot be made, or its file system has no locks.
    """
    made: list[Path] = []
    while True:
        with _opened(path, made) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(lock.fileno(), path):
                continue  # Whoever held it has removed it: there may be a new one.
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                for folder in made:
                    with contextlib.suppress(OSError):  # Not empty.
                        folder.rmdir()
            return


def _settle_hub(argv: Sequence[str], environ: MutableMapping[str, str]) -> tuple[str | None, list[str]]:
    """Gives the hub's library what TEI's options say; returns the revision, and the other arguments."""
    revision, rest = take(argv, _REVISION)
    revision = revision or environ.pop("REVISION", None) or None
    for name in _TOKENS:
        token, rest = take(rest, name)
        token = token or environ.get("HF_API_TOKEN")
        if token and not environ.get("HF_TOKEN"):
            environ["HF_TOKEN"] = token
    cache, rest = take(rest, _CACHE)
    if cache:
        environ["HF_HUB_CACHE"] = cache
    return revision, rest


def _export_options(
    revision: str | None, task: str | None, pooling: str | None, environ: Mapping[str, str]
) -> list[str]:
    options = shlex.split(environ.get(EXPORT_VARIABLE, ""))
    if not any(word.partition("=")[0] == "--variants" for word in options):
        options += ["--variants", VARIANTS]
    given = {"--revision": revision, "--task": task, "--pooling": POOLINGS.get(pooling or "", pooling)}
    return [*options, *(word for name, value in given.items() if value for word in (name, value))]


def main(argv: Sequence[str]) -> int:
    """Exports what is no bundle yet, and serves until a signal.

    Args:
        argv: Arguments after `run`.

    Returns:
        The exit code: 2 where the model cannot be exported, else that of the server.
    """
    if any(word in {"-h", "--help"} for word in argv):
        print(USAGE, end="")
        return 0
    revision, rest = _settle_hub(argv, os.environ)
    arguments = parse(rest, "run")
    model: str = arguments.model
    if (Path(model) / MANIFEST_FILE).exists():
        return serve(rest)
    options = _export_options(revision, arguments.task, arguments.pooling, os.environ)
    bundles = Path(os.environ.get(BUNDLES_VARIABLE) or "bundles")
    target = bundles / bundle_name(model, options)
    try:
        # Several containers may share the folder: one exports, the others wait for it.
        with _locked(bundles / f".{target.name}.lock"):
            if not (target / MANIFEST_FILE).exists():
                print(f"exporting {model} into {target}", file=sys.stderr, flush=True)
                code = _export(model, target, options)
                if code is None:
                    return 0  # Nothing was accepted, and whoever stops a server expects 0.
                if code != 0:
                    return code
    except OSError as error:
        print(
            f"python -m deploy run: {bundles}: cannot keep a bundle there ({error.strerror}); name a folder of a "
            f"volume that this user can write to by {BUNDLES_VARIABLE}",
            file=sys.stderr,
        )
        return 2
    if arguments.task is not None:
        _, rest = take(rest, "--task")  # The bundle says it.
    return serve(with_bundle(rest, model, str(target)))
