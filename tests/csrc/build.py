"""Builds and runs the tests of the torch-free C++: kernels, packing, loop nest, attention, dispatch.

From the command line::

    python tests/csrc/build.py native                        # this machine
    python tests/csrc/build.py aarch64 --cpu cortex-a72 -- --quick   # cross-compiled, under qemu-aarch64-static
    python tests/csrc/build.py aarch64-clang -- --quick      # the same as clang compiles it
    python tests/csrc/build.py sanitize                      # this machine, AddressSanitizer and UBSan
    python tests/csrc/build.py thread-sanitize -- --filter thread_pool   # ThreadSanitizer, for what has threads
    python tests/csrc/build.py native -- --random 2000 --filter random --seed 7   # a long randomized run

Arguments after ``--`` go to the program; ``-- --help`` lists them. ``CXX`` is the compiler for this machine;
ThreadSanitizer follows the tests that fork with clang++ and LLVM's compiler-rt only. If it stops with "unexpected
memory mapping", run the program that ``--build-only`` prints under ``setarch -R``.
Objects are kept in ``build/csrc-tests`` under a hash of everything that went into them. The program for this machine is
linked with the objects of the extension where that was built in place and nothing has changed since.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "torch_ext" / "csrc"
TESTS = ROOT / "tests" / "csrc"
BUILD = ROOT / "build" / "csrc-tests"

# The kernels are tested as setup.py ships them; test_kernels.py compares these flags with it.
SHIPPED_FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
EMULATOR = "qemu-aarch64-static"


@dataclass(frozen=True)
class Variant:
    """One way to build the program.

    Attributes:
        compiler: command of the C++ compiler.
        kernel_flags: flags of torch_ext/csrc.
        test_flags: flags of tests/csrc; fast to compile.
        link_flags: flags of the link.
        runner: command that the program is run with, empty for this machine's own.
        extension: whether objects of the extension that is built in place may be linked instead of compiled ones.
    """

    compiler: str
    kernel_flags: tuple[str, ...] = SHIPPED_FLAGS
    test_flags: tuple[str, ...] = ("-O1", "-std=c++20")
    link_flags: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    extension: bool = False


_THREAD_SANITIZER = ("-O1", "-g", "-std=c++20", "-fsanitize=thread")
_SANITIZERS = ("-O1", "-g", "-std=c++20", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

VARIANTS = {
    "native": Variant(os.environ.get("CXX", "g++"), extension="CXX" not in os.environ),
    "aarch64": Variant("aarch64-linux-gnu-g++", link_flags=("-static",), runner=(EMULATOR,)),
    "aarch64-clang": Variant("clang++-19 --target=aarch64-linux-gnu", link_flags=("-static",), runner=(EMULATOR,)),
    "sanitize": Variant(os.environ.get("CXX", "g++"), _SANITIZERS, _SANITIZERS, _SANITIZERS),
    "thread-sanitize": Variant(os.environ.get("CXX", "g++"), _THREAD_SANITIZER, _THREAD_SANITIZER, _THREAD_SANITIZER),
}


def missing_tools(variant: str) -> list[str]:
    """Names of the commands that building and running a variant needs and that are not there."""
    v = VARIANTS[variant]
    return [tool for tool in (shlex.split(v.compiler)[0], *v.runner[:1]) if shutil.which(tool) is None]


def kernel_sources() -> list[Path]:
    """The C++ that knows nothing of torch or Python: all but ops, registration, module, and the shims of the link."""
    left_out = {CSRC / "ops", CSRC / "compat", CSRC / "python"}
    found = [
        path
        for path in sorted(CSRC.rglob("*.cpp"))
        if path != CSRC / "registration.cpp" and not left_out & set(path.parents)
    ]
    if not found:
        raise FileNotFoundError(f"no C++ sources under {CSRC}: is this a complete checkout?")
    return found


@functools.cache
def _compiler_version(compiler: str) -> bytes:
    return subprocess.run([*shlex.split(compiler), "--version"], check=True, capture_output=True).stdout


def _digest(parts: list[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:20]


def _headers(*folders: Path) -> list[bytes]:
    return [
        path.relative_to(ROOT).as_posix().encode() + b"\n" + path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix in {".h", ".inl"} and CSRC / "ops" not in path.parents
    ]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


def _make(target: Path, command: list[str]) -> Path:
    """Run a command that ends in ``-o target``, unless the target is there; it appears complete or not at all."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="new-") as scratch:
            made = Path(scratch) / target.name
            _run([*command, "-o", str(made)])
            made.replace(target)
    return target


def build(variant: str) -> Path:
    """Compile and link what has changed. One process builds a variant, others wait for it.

    Args:
        variant: a key of ``VARIANTS``.

    Returns:
        The program.

    Raises:
        RuntimeError: the compiler failed; the message holds its output.
        FileNotFoundError: there is no compiler of that name, or no source.
    """
    with _locked(variant) as folder:
        return _build(VARIANTS[variant], folder)


def compile_sources(variant: str, sources: Sequence[Path]) -> list[Path]:
    """Compile some sources as a variant has them, those that have changed.

    Args:
        variant: a key of ``VARIANTS``.
        sources: .cpp files of torch_ext/csrc or tests/csrc.

    Returns:
        The objects, in the order of the sources.

    Raises:
        RuntimeError: the compiler failed; the message holds its output.
    """
    with _locked(variant) as folder:
        return _compile(VARIANTS[variant], folder, sources)


@contextlib.contextmanager
def _locked(variant: str) -> Iterator[Path]:
    """The folder of a variant, for this process alone: others wait, and find what it has made."""
    folder = BUILD / variant
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def objects_of_extension() -> dict[Path, Path]:
    """Objects of the extension that is built in place, by their sources: those newer than all that they are made of."""
    platform = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    objects = ROOT / "build" / platform / CSRC.relative_to(ROOT)
    common = [ROOT / "setup.py", *(path for path in CSRC.rglob("*") if path.suffix in {".h", ".inl"})]
    common += (CSRC.parent / "include").glob("*.h")
    changed = max(path.stat().st_mtime for path in common)
    found = {}
    for source in kernel_sources():
        made = (objects / source.relative_to(CSRC)).with_suffix(".o")
        if made.exists() and made.stat().st_mtime > max(changed, source.stat().st_mtime):
            found[source] = made
    return found


def _compile(v: Variant, folder: Path, sources: Sequence[Path]) -> list[Path]:
    kernel_headers, test_headers = _headers(CSRC, CSRC.parent / "include"), _headers(TESTS)
    of_extension = objects_of_extension() if v.extension else {}

    def compile_one(source: Path) -> Path:
        if source in of_extension:
            made = of_extension[source]
            # A copy, since the next build of the extension writes into the original.
            copied = folder / f"{source.stem}-{_digest([made.read_bytes()])}.o"
            if not copied.exists():
                shutil.copy(made, scratch := copied.with_suffix(".new"))
                scratch.replace(copied)
            return copied
        is_test = TESTS in source.parents
        command = [
            *shlex.split(v.compiler),
            *(v.test_flags if is_test else v.kernel_flags),
            *WARNINGS,
            f"-ffile-prefix-map={ROOT}/=",
            f"-I{CSRC}",
            *([f"-I{TESTS}"] if is_test else []),
            *("-c", str(source)),
        ]
        relative = [word.replace(str(ROOT), "") for word in command]
        key = _digest(
            [
                " ".join(relative).encode(),
                _compiler_version(v.compiler),
                source.read_bytes(),
                *kernel_headers,
                *(test_headers if is_test else []),
            ]
        )
        return _make(folder / f"{source.stem}-{key}.o", command)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, sources))


def _build(v: Variant, folder: Path) -> Path:
    sources = kernel_sources() + sorted(TESTS.glob("*.cpp"))
    # The largest first, so that no long one is left over at the end.
    sources.sort(key=lambda path: (CSRC / "kernels" not in path.parents, -path.stat().st_size))
    objects = sorted(_compile(v, folder, sources))
    key = _digest([path.name.encode() for path in objects] + [" ".join(v.link_flags).encode()])
    program = _make(
        folder / f"kernel_tests-{key}",
        [*shlex.split(v.compiler), *(str(path) for path in objects), *v.link_flags],
    )
    for old in set(folder.glob("*-*")) - {program, *objects}:
        if old.is_file():
            old.unlink(missing_ok=True)
    return program


def command(variant: str, program: Path, cpu: str | None = None) -> list[str]:
    """The words that run the program.

    Args:
        variant: what it was built as.
        program: what ``build`` returned.
        cpu: the CPU that the emulator shows, such as ``max``, ``neoverse-n1`` or ``cortex-a72``.

    Raises:
        ValueError: a CPU was named for a variant that runs without an emulator.
    """
    runner = list(VARIANTS[variant].runner)
    if cpu and not runner:
        raise ValueError(f"{variant} runs on this machine's own CPU: leave --cpu out")
    return [*runner, *(["-cpu", cpu] if cpu else []), str(program)]


def main(argv: list[str]) -> int:
    """Build one variant and run it; returns the program's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--cpu", help="CPU that the emulator shows (aarch64): max, neoverse-n1, cortex-a72")
    parser.add_argument("--build-only", action="store_true", help="print the program's path instead of running it")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    missing = missing_tools(args.variant)
    if missing:
        parser.error(f"{args.variant} needs {' and '.join(missing)}: not found")
    program = build(args.variant)
    if args.build_only:
        print(program)
        return 0
    return subprocess.run([*command(args.variant, program, args.cpu), *argv[split + 1 :]]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
