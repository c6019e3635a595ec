"""python -m torch_ext.doctor, on machines that are made up of files, and on this one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_ext
from torch_ext import doctor
from torch_ext.doctor import Finding, Machine

GRAVITON3 = """processor\t: 0
Features\t: fp asimd asimddp sve asimdfhm svebf16 i8mm bf16 dgh rng
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


def machine(root: Path, files: dict[str, str], **fields: Any) -> Machine:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(
        root=root, **{"environ": {}, "affinity": 64, "architecture": "aarch64", "page_bytes": 4096, **fields}
    )


def find(findings: list[Finding], name: str) -> Finding:
    (finding,) = (finding for finding in findings if finding.name == name)
    return finding


@pytest.mark.parametrize(
    ("files", "affinity", "quota", "usable"),
    [
        ({}, 64, None, 64),
        ({}, 3, None, 3),
        # v2, in a container: the group is the root of what is mounted.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, 8, None, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000"}, 64, 2.5, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 64, 0.5, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000"}, 4, 8, 4),
        # v2, outside: the tightest level counts.
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.scope\n",
                "sys/fs/cgroup/a.slice/cpu.max": "300000 100000",
                "sys/fs/cgroup/a.slice/b.scope/cpu.max": "600000 100000",
            },
            64,
            3,
            3,
        ),
        # v2, with the host's path, which is not mounted.
        ({"proc/self/cgroup": "0::/../../pod7/x\n", "sys/fs/cgroup/cpu.max": "200000 100000"}, 64, 2, 2),
        # v1.
        (
            {
                "proc/self/cgroup": "11:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            64,
            1.5,
            1,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            6,
            None,
            6,
        ),
        ({"proc/self/cgroup": "nonsense\n0::\n", "sys/fs/cgroup/cpu.max": "garbage"}, 6, None, 6),
    ],
)
def test_usable_cpus(tmp_path: Path, files: dict[str, str], affinity: int, quota: float | None, usable: int) -> None:
    fake = machine(tmp_path, files, affinity=affinity)
    assert fake.cpu_quota() == quota
    assert fake.usable_cpus() == usable


def test_threads_beyond_the_quota_fail(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    quota = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000"}
    finding = find(doctor.diagnose(machine(tmp_path, quota)), "threads")
    assert finding.status == "FAIL"
    assert "OMP_NUM_THREADS=1" in finding.advice
    torch.set_num_threads(1)
    assert find(doctor.diagnose(machine(tmp_path, quota)), "threads").status == "OK"
    few = machine(tmp_path / "none", {}, environ={"OMP_NUM_THREADS": "1"}, affinity=4)
    assert find(doctor.diagnose(few), "threads").status == "WARN"


def test_memory(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal:       16384000 kB\n"}
    assert find(doctor.diagnose(machine(tmp_path / "a", meminfo)), "memory").detail == "16000 MiB"
    limited = {**meminfo, "proc/self/cgroup": "0::/x\n", "sys/fs/cgroup/memory.max": str(512 << 20)}
    finding = find(doctor.diagnose(machine(tmp_path / "b", limited)), "memory")
    assert (finding.status, finding.detail) == ("WARN", "512 MiB (limit of the container)")
    v1 = {"proc/self/cgroup": "3:memory:/x\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}
    assert machine(tmp_path / "c", v1).memory_limit_bytes() is None
    assert find(doctor.diagnose(machine(tmp_path / "d", {})), "memory").detail == "size unknown"


@pytest.mark.parametrize(
    ("files", "architecture", "host"),
    [
        ({}, "aarch64", None),
        ({"proc/cpuinfo": GRAVITON3}, "aarch64", None),
        ({"proc/sys/kernel/arch": "aarch64"}, "aarch64", None),
        ({"proc/sys/kernel/arch": "x86_64"}, "x86_64", None),
        ({"proc/sys/kernel/arch": "x86_64"}, "aarch64", "x86_64"),
        ({"proc/sys/kernel/arch": "aarch64"}, "x86_64", "aarch64"),
        ({"sys/devices/system/cpu/modalias": "cpu:type:x86,ven0000fam0006"}, "aarch64", "x86_64"),
        ({"proc/cpuinfo": "vendor_id\t: GenuineIntel\nmodel name\t: Xeon\n"}, "aarch64", "x86_64"),
    ],
)
def test_emulation(tmp_path: Path, files: dict[str, str], architecture: str, host: str | None) -> None:
    fake = machine(tmp_path, files, architecture=architecture)
    assert fake.emulated_on() == host
    assert find(doctor.diagnose(fake), "emulation").status == ("OK" if host is None else "WARN")


def test_cpu(tmp_path: Path) -> None:
    detail = find(doctor.diagnose(machine(tmp_path, {"proc/cpuinfo": GRAVITON3})), "cpu").detail
    assert detail == "Neoverse V1 (Graviton3), aarch64: asimddp bf16 i8mm sve svebf16"
    other = GRAVITON3.replace("0xd40", "0xfff")
    assert machine(tmp_path, {"proc/cpuinfo": other}).cpu_name() == "Arm core 0xfff of implementer 0x41"
    assert machine(tmp_path, {"proc/cpuinfo": "model name\t: Xeon\n"}).cpu_name() == "Xeon"
    assert machine(tmp_path, {"proc/cpuinfo": ""}).cpu_name() == "unknown"


@pytest.mark.parametrize(
    ("name", "status", "files", "fields"),
    [
        ("cpuinfo", "WARN", {}, {}),
        ("cpuinfo", "OK", {"sys/devices/system/cpu/possible": "0-3"}, {}),
        ("openmp", "OK", {}, {}),
        ("openmp", "OK", {}, {"environ": {"OMP_NUM_THREADS": "4,2"}}),
        ("openmp", "FAIL", {}, {"environ": {"OMP_NUM_THREADS": "0"}}),
        ("openmp", "FAIL", {}, {"environ": {"OMP_NUM_THREADS": "all"}}),
        ("openmp", "WARN", {}, {"environ": {"OMP_WAIT_POLICY": "ACTIVE"}}),
        ("openmp", "WARN", {}, {"environ": {"GOMP_CPU_AFFINITY": "0-63"}}),
        ("huge pages", "OK", {}, {}),
        ("huge pages", "OK", {"sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never"}, {}),
        ("huge pages", "WARN", {"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never"}, {}),
        (
            "huge pages",
            "OK",
            {"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never"},
            {"environ": {"THP_MEM_ALLOC_ENABLE": "1"}},
        ),
        ("huge pages", "WARN", {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"}, {}),
        ("page size", "OK", {}, {"page_bytes": 65536}),
        ("page size", "WARN", {}, {"page_bytes": 65536, "environ": {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}}),
        ("preload", "OK", {}, {}),
        ("preload", "WARN", {}, {"environ": {"LD_PRELOAD": "/usr/lib/gone.so"}}),
        ("preload", "OK", {"usr/lib/here.so": ""}, {"environ": {"LD_PRELOAD": "/usr/lib/here.so libx.so"}}),
    ],
)
def test_findings(tmp_path: Path, name: str, status: str, files: dict[str, str], fields: dict[str, Any]) -> None:
    finding = find(doctor.diagnose(machine(tmp_path, files, **fields)), name)
    assert finding.status == status
    assert bool(finding.advice) == (status != "OK")


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch_ext.doctor", *arguments]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True)


def test_this_machine() -> None:
    process = run("--json", OMP_NUM_THREADS="1")
    report = json.loads(process.stdout)
    assert process.returncode == (1 if report["status"] == "FAIL" else 0)
    states = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert states["extension"] == states["self-test"] == states["torch"] == "OK"
    assert report["isa_report"]["isa"] == torch_ext.isa_report()["isa"]
    table = run(OMP_NUM_THREADS="1")
    assert table.returncode == process.returncode
    assert all(name in table.stdout for name in states)


def test_forced_isa_is_told() -> None:
    best = next(entry["name"] for entry in torch_ext.isa_report()["candidates"] if entry["supported"])
    if best == "portable":
        expected = "OK"
    else:
        expected = "WARN"
    report = json.loads(run("--json", TORCH_EXT_ISA="portable").stdout)
    finding = next(finding for finding in report["findings"] if finding["name"] == "kernels")
    assert finding["status"] == expected or "no bf16" in finding["detail"]
    assert finding["detail"].startswith("portable on ")
    kernel = torch_ext.isa_report()["int8_kernels"][-1]
    plain = json.loads(run("--json").stdout)
    detail = next(finding["detail"] for finding in plain["findings"] if finding["name"] == "kernels")
    assert kernel.endswith(re.search(r"int8 with (\w+)", detail)[1])


def test_runs_where_the_extension_does_not_load(tmp_path: Path) -> None:
    package = Path(torch_ext.__file__).parent
    copy = tmp_path / "torch_ext"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("csrc", "*.so", "__pycache__"))
    # The copy comes before what is on the path already, where torch may be.
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)

    process = python("-m", "torch_ext.doctor", "--json")
    assert process.returncode == 1, process.stderr
    report = json.loads(process.stdout)
    finding = next(finding for finding in report["findings"] if finding["name"] == "extension")
    assert finding["status"] == "FAIL"
    assert "_C.abi3.so is missing" in finding["detail"]
    process = python("-c", "import torch_ext")
    assert process.returncode == 1
    assert "ImportError: torch_ext: " in process.stderr
    assert "pip install --no-build-isolation" in process.stderr

    (copy / "_C.abi3.so").write_bytes(b"not a library")
    process = python("-m", "torch_ext.doctor")
    assert process.returncode == 1
    assert "cannot load" in process.stdout
