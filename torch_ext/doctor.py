"""``python -m torch_ext.doctor``: what this machine can do, and what is set wrong.

Every finding is OK, WARN (it works, but slower than it could, or unlike a real machine) or FAIL (it does not work, or
is many times slower), with what to do about it. The exit code is 1 if anything FAILs. It also runs where the extension
does not load, and says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

from torch_ext._library import TORCH, is_too_old
from torch_ext.machine import Machine

__all__ = ["Finding", "Machine", "diagnose", "main"]

Status = Literal["OK", "WARN", "FAIL"]

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: ``OK``, ``WARN`` or ``FAIL``.
        detail: what was found.
        advice: what to do; empty if there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def diagnose(machine: Machine | None = None) -> list[Finding]:
    """Look at everything.

    Args:
        machine: the system; by default, this one.

    Returns:
        The findings, in a fixed order.
    """
    machine = machine or Machine()
    findings = [_check_torch()]
    if findings[0].detail == _NO_TORCH:
        findings.append(_check_runtime())
        if findings[-1].status != "FAIL":
            findings.append(_check_isa(machine))
    elif findings[0].status != "FAIL":
        findings.append(_check_extension())
        if findings[-1].status != "FAIL":
            findings += [_check_isa(machine), _check_result()]
        findings.append(_check_threads(machine))
    checks: list[Callable[[Machine], Finding]] = [
        _check_cpu,
        _check_emulation,
        _check_cpuinfo,
        _check_openmp,
        _check_memory,
        _check_huge_pages,
        _check_page_size,
        _check_preload,
    ]
    return findings + [check(machine) for check in checks]


_NO_TORCH = "not installed: optimize(), Encoder and the ops need it; torch_ext.runtime and the server do not"


def _check_torch() -> Finding:
    try:
        import torch
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            advice = "pip install 'torch-ext[torch]'"
            return Finding("torch", "WARN", _NO_TORCH, advice)
        return Finding("torch", "FAIL", f"cannot be imported: {error}", f"pip install '{TORCH}'")
    detail = f"{torch.__version__}, Python {platform.python_version()}"
    if is_too_old(torch.__version__):
        return Finding("torch", "FAIL", detail, f"torch_ext needs {TORCH}: pip install -U torch")
    config = torch.__config__.parallel_info()
    if "ATen parallel backend: OpenMP" not in config:
        return Finding("torch", "WARN", f"{detail}, built without OpenMP", "install torch from PyPI or pytorch.org")
    if torch.version.cuda or torch.version.hip:
        return Finding("torch", "OK", f"{detail}, a build for GPUs (the CPU build is smaller, and as fast here)")
    return Finding("torch", "OK", f"{detail}, CPU build")


def _check_extension() -> Finding:
    from torch_ext import __version__, _library

    try:
        _library.load_library()
    except ImportError as error:
        return Finding("extension", "FAIL", str(error), "see the message")
    return Finding("extension", "OK", f"torch_ext {__version__}, {_library.LIBRARY}")


def _check_runtime() -> Finding:
    from torch_ext import __version__

    try:
        from torch_ext import runtime
    except ImportError as error:
        return Finding("runtime", "FAIL", str(error), "see the message")
    return Finding("runtime", "OK", f"torch_ext {__version__}, {runtime.default_threads()} threads for each encoder")


def _isa_report() -> dict[str, Any]:
    """By what is there: the ops, or the runtime, which has the same kernels."""
    if importlib.util.find_spec("torch") is None:
        from torch_ext import runtime

        return runtime.isa_report()
    from torch_ext.ops import isa_report

    return isa_report()


def _check_isa(machine: Machine) -> Finding:
    try:
        report = _isa_report()
    except RuntimeError as error:
        return Finding("kernels", "FAIL", str(error).splitlines()[0], "unset TORCH_EXT_ISA")
    isa = report["isa"]
    best = next((entry["name"] for entry in report["candidates"] if entry["supported"]), isa)
    int8 = re.sub(r".*_\d+x\d+_", "", report["int8_kernels"][-1])  # gemm_..._8x32_avx512_vnni: its instructions
    detail = f"{isa} on {report['arch']}, int8 with {int8}"
    if isa != best:
        return Finding("kernels", "WARN", f"{detail}, forced; the best for this CPU is {best}", "unset TORCH_EXT_ISA")
    if machine.architecture in ("aarch64", "arm64") and "bf16" not in isa:
        return Finding(
            "kernels",
            "WARN",
            f"{detail}: this CPU has no bf16 instructions, so that results are right but bf16 gains little",
            "use an instance with bf16: Graviton3 or later, Yitian 710, Cobalt 100, Axion, AmpereOne",
        )
    return Finding("kernels", "OK", detail)


def _check_result() -> Finding:
    """Run the kernels once, and compare."""
    import torch

    from torch_ext.ops import linear, pack_linear_weight

    rows, columns, depth = 13, 37, 129
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator, dtype=torch.float32, device="cpu").bfloat16()
    weight = torch.randn(columns, depth, generator=generator, dtype=torch.float32, device="cpu").bfloat16()
    try:
        result = linear(x, pack_linear_weight(weight), out_dtype=torch.float32)
    except RuntimeError as error:
        return Finding("self-test", "FAIL", str(error).splitlines()[0], "report this, with the output of --json")
    exact = x.double() @ weight.double().T
    # Sums in fp32; PyTorch's own kernels give the result in bf16.
    bound = 8 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T) + 2.0**-8 * exact.abs()
    if not bool(((result.double() - exact).abs() <= bound).all()):
        return Finding("self-test", "FAIL", "linear gives wrong results", "report this, with the output of --json")
    return Finding("self-test", "OK", f"linear {rows}x{depth}x{columns} is right")


def _check_threads(machine: Machine) -> Finding:
    import torch

    threads, usable, quota = torch.get_num_threads(), machine.usable_cpus(), machine.cpu_quota()
    limit = "no quota" if quota is None else f"quota of {quota:g} CPUs"
    detail = f"torch uses {threads}, {usable} can run at once ({machine.affinity} CPUs by affinity, {limit})"
    if threads > usable:
        return Finding(
            "threads",
            "FAIL",
            f"{detail}: threads that wait for each other are throttled, up to tens of times slower",
            f"set OMP_NUM_THREADS={usable}, or call torch.set_num_threads({usable})",
        )
    if threads < usable and "OMP_NUM_THREADS" in machine.environ:
        return Finding("threads", "WARN", detail, f"raise OMP_NUM_THREADS to {usable}, unless several processes share")
    return Finding("threads", "OK", detail)


def _check_cpu(machine: Machine) -> Finding:
    info = machine.read("/proc/cpuinfo") or ""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    names = set(match[1].split()) if match else set()
    wanted = (
        *("asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16"),
        *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"),
    )
    found = " ".join(name for name in wanted if name in names) or "no known features"
    return Finding("cpu", "OK", f"{machine.cpu_name()}, {machine.architecture}: {found}")


def _check_emulation(machine: Machine) -> Finding:
    host = machine.emulated_on()
    if host is not None:
        return Finding(
            "emulation",
            "WARN",
            f"{machine.architecture} is emulated on {host}: results are right, times mean nothing",
            f"measure on real hardware; for production use an image for {host}",
        )
    return Finding("emulation", "OK", "none")


def _check_cpuinfo(machine: Machine) -> Finding:
    if machine.read("/sys/devices/system/cpu/possible") is None:
        return Finding(
            "cpuinfo",
            "WARN",
            "/sys/devices/system/cpu/possible cannot be read: libraries print 'Error in cpuinfo: failed to parse the "
            "list of possible processors' and may not see the CPU's features",
            "mount /sys read-only in the container (sandboxes such as gVisor and AWS Lambda do not)",
        )
    return Finding("cpuinfo", "OK", "/sys lists the processors")


def _check_openmp(machine: Machine) -> Finding:
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_DYNAMIC")
    values = {name: machine.environ[name] for name in names if name in machine.environ}
    detail = " ".join(f"{name}={value}" for name, value in values.items()) or "no OMP_* variables are set"
    threads = values.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", threads):
        return Finding("openmp", "FAIL", detail, "OMP_NUM_THREADS has to be a positive number")
    if values.get("OMP_WAIT_POLICY", "").lower() == "active":
        return Finding(
            "openmp",
            "WARN",
            f"{detail}: idle threads spin, and take the time of other threads (tokenization, HTTP)",
            "unset OMP_WAIT_POLICY in a server",
        )
    if "GOMP_CPU_AFFINITY" in values or "KMP_AFFINITY" in values:
        return Finding(
            "openmp",
            "WARN",
            f"{detail}: fixed CPU numbers fail where a container is given others",
            "use OMP_PROC_BIND=true, or taskset or the container's cpuset",
        )
    return Finding("openmp", "OK", detail)


def _check_memory(machine: Machine) -> Finding:
    limit, total = machine.memory_limit_bytes(), machine.memory_bytes()
    usable = min((value for value in (limit, total) if value is not None), default=None)
    if usable is None:
        return Finding("memory", "OK", "size unknown")
    detail = f"{usable // _MIB} MiB" + (" (limit of the container)" if usable == limit else "")
    if usable < 768 * _MIB:
        return Finding("memory", "WARN", detail, "torch and a small BERT need about 700 MiB: raise the limit")
    return Finding("memory", "OK", detail)


def _check_huge_pages(machine: Machine) -> Finding:
    text = machine.read("/sys/kernel/mm/transparent_hugepage/enabled")
    match = re.search(r"\[(\w+)\]", text or "")
    if match is None:
        return Finding("huge pages", "OK", "the kernel does not say")
    mode = match[1]
    if mode == "always" or (mode == "madvise" and machine.environ.get("THP_MEM_ALLOC_ENABLE") == "1"):
        return Finding("huge pages", "OK", f"transparent huge pages: {mode}")
    if mode == "madvise":
        return Finding(
            "huge pages",
            "WARN",
            "transparent huge pages: madvise, which torch does not ask for by default",
            "set THP_MEM_ALLOC_ENABLE=1, or write always to /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return Finding(
        "huge pages",
        "WARN",
        f"transparent huge pages: {mode}",
        "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, and set THP_MEM_ALLOC_ENABLE=1",
    )


def _check_page_size(machine: Machine) -> Finding:
    detail = f"{machine.page_bytes // 1024} KiB"
    if machine.page_bytes > 4096 and "jemalloc" in machine.environ.get("LD_PRELOAD", ""):
        return Finding(
            "page size",
            "WARN",
            f"{detail}, and jemalloc is preloaded: one built for 4 KiB pages aborts",
            "use tcmalloc, or a jemalloc built with --with-lg-page=16",
        )
    return Finding("page size", "OK", detail)


def _check_preload(machine: Machine) -> Finding:
    libraries = [name for name in re.split(r"[:\s]+", machine.environ.get("LD_PRELOAD", "")) if name]
    missing = [name for name in libraries if "/" in name and not (machine.root / name.lstrip("/")).exists()]
    if missing:
        return Finding(
            "preload", "WARN", f"LD_PRELOAD names {', '.join(missing)}, which is not there", "correct LD_PRELOAD"
        )
    return Finding("preload", "OK", f"LD_PRELOAD={':'.join(libraries)}" if libraries else "nothing")


def _worst(findings: list[Finding]) -> Status:
    states = {finding.status for finding in findings}
    return "FAIL" if "FAIL" in states else "WARN" if "WARN" in states else "OK"


def _report(findings: list[Finding]) -> dict[str, Any]:
    """What --json prints."""
    report: dict[str, Any] = {
        "status": _worst(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    if any(finding.name == "kernels" and finding.status != "FAIL" for finding in findings):
        report["isa_report"] = _isa_report()
    return report


def main(argv: list[str] | None = None) -> int:
    """Print the findings.

    Args:
        argv: the arguments; by default, those of the process.

    Returns:
        The exit code: 1 if anything failed, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m torch_ext.doctor", description=__doc__.split("\n\n")[1], allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    findings = diagnose()
    if arguments.json:
        print(json.dumps(_report(findings), indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{finding.status:4}  {finding.name:{width}}  {finding.detail}")
            if finding.advice:
                print(f"{'':4}  {'':{width}}  -> {finding.advice}")
    return 1 if _worst(findings) == "FAIL" else 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        # `| head -1`, or a full disk. Python's own attempt to write the rest, as it ends, would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            print(f"error: cannot write the findings: {error.strerror}", file=sys.stderr)
        sys.exit(141 if isinstance(error, BrokenPipeError) else 2)
    sys.exit(code)
