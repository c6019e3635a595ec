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
from tests import warm
from torch_ext import doctor
from torch_ext.doctor import Finding, Machine
from torch_ext.machine import name_cpu

GRAVITON3 = """processor\t: 0
Features\t: fp asimd asimddp sve asimdfhm svebf16 i8mm bf16 dgh rng
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""

COBALT100 = """processor\t: 0
BogoMIPS\t: 2000.00
Features\t: fp asimd asimddp sve i8mm bf16
CPU implementer\t: 0x6d
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd49
CPU revision\t: 0
"""

OLD_KERNEL = """Processor\t: AArch64 Processor rev 4 (aarch64)
processor\t: 0
processor\t: 1

Features\t: fp asimd
CPU implementer\t: 0x41
CPU part\t: 0xd03
"""

COMPAT = "model name\t: ARMv8 Processor rev 1 (v8l)\n"

MOUNTED_V2 = "31 23 0:28 {root} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"

MOUNTED_V1 = """32 31 0:29 /docker/1 /sys/fs/cgroup/cpu,cpuacct ro,nosuid master:15 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/1 /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory
40 31 0:37 /docker/1 /sys/fs/cgroup/systemd ro,nosuid - cgroup cgroup rw,xattr,name=systemd
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
        ({"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": "x\n1 2 - cgroup2\n"}, 6, None, 6),
        # v2, mounted elsewhere, under a name with a blank.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "proc/self/mountinfo": MOUNTED_V2.format(root="/", point="/mnt/control\\040groups"),
                "mnt/control groups/cpu.max": "max 100000",
                "mnt/control groups/a/cpu.max": "400000 100000",
                "mnt/control groups/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/b/cpu.max": "100000 100000",
            },
            64,
            4,
            4,
        ),
        # v2, a group nested in a container's, which is mounted under the host's path; a pod's quota above both.
        (
            {
                "proc/self/cgroup": "0::/pod7/box/inner/leaf\n",
                "proc/self/mountinfo": MOUNTED_V2.format(root="/pod7/box", point="/sys/fs/cgroup"),
                "sys/fs/cgroup/cpu.max": "800000 100000",
                "sys/fs/cgroup/inner/cpu.max": "350000 100000",
                "sys/fs/cgroup/inner/leaf/cpu.max": "max 100000",
            },
            64,
            3.5,
            3,
        ),
        # v2, the mounted group has a name that only begins like that of the process.
        (
            {
                "proc/self/cgroup": "0::/box2\n",
                "proc/self/mountinfo": MOUNTED_V2.format(root="/box", point="/sys/fs/cgroup"),
                "sys/fs/cgroup/cpu.max": "600000 100000",
                "sys/fs/cgroup/2/cpu.max": "100000 100000",
            },
            64,
            6,
            6,
        ),
        # v2, every level of a deep tree: the third has the least.
        (
            {
                "proc/self/cgroup": "0::/a/b/c/d/e\n",
                "proc/self/mountinfo": MOUNTED_V2.format(root="/", point="/sys/fs/cgroup"),
                **{
                    f"sys/fs/cgroup/{path}/cpu.max": f"{quota}00000 100000"
                    for path, quota in {"a": 9, "a/b": 8, "a/b/c": 2, "a/b/c/d": 7, "a/b/c/d/e": 5}.items()
                },
            },
            64,
            2,
            2,
        ),
        # v1 in Docker without a namespace, a group nested in the container's; another controller's quota is none.
        (
            {
                "proc/self/cgroup": "4:cpuacct,cpu:/docker/1/inner\n3:memory:/docker/1\n",
                "proc/self/mountinfo": MOUNTED_V1,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "800000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_period_us": "50000",
                "sys/fs/cgroup/memory/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/memory/cpu.cfs_period_us": "100000",
            },
            64,
            3,
            3,
        ),
        # v1 and v2 side by side: both count.
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/1\n0::/docker/1/x\n",
                "proc/self/mountinfo": MOUNTED_V1 + MOUNTED_V2.format(root="/docker/1", point="/sys/fs/cgroup/unified"),
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "800000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/unified/x/cpu.max": "500000 100000",
            },
            64,
            5,
            5,
        ),
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
    assert machine(tmp_path / "c", v1).available_memory_bytes() is None
    assert find(doctor.diagnose(machine(tmp_path / "d", {})), "memory").detail == "size unknown"


def test_memory_of_nested_groups(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal:  16384000 kB\nMemFree:  100 kB\nMemAvailable:  8192000 kB\n",
        "proc/self/cgroup": "0::/box/inner/leaf\n",
        "proc/self/mountinfo": MOUNTED_V2.format(root="/box", point="/sys/fs/cgroup"),
        "sys/fs/cgroup/memory.max": str(900 << 20),
        "sys/fs/cgroup/memory.current": str(850 << 20),
        "sys/fs/cgroup/inner/memory.max": str(700 << 20),
        "sys/fs/cgroup/inner/memory.current": str(200 << 20),
        "sys/fs/cgroup/inner/leaf/memory.max": "max",
        "sys/fs/cgroup/inner/leaf/memory.current": str(100 << 20),
    }
    nested = machine(tmp_path / "v2", files)
    assert nested.memory_limit_bytes() == 700 << 20
    # The group with the least limit is not the one with the least room.
    assert nested.available_memory_bytes() == 50 << 20
    old = machine(
        tmp_path / "v1",
        {
            "proc/meminfo": files["proc/meminfo"],
            "proc/self/cgroup": "3:memory:/docker/1/inner\n",
            "proc/self/mountinfo": MOUNTED_V1,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/inner/memory.limit_in_bytes": str(300 << 20),
            "sys/fs/cgroup/memory/inner/memory.usage_in_bytes": str(400 << 20),
        },
    )
    assert old.memory_limit_bytes() == 300 << 20
    assert old.available_memory_bytes() == 0
    assert machine(tmp_path / "free", {"proc/meminfo": files["proc/meminfo"]}).available_memory_bytes() == 8192000 << 10


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
    assert machine(tmp_path, {"proc/cpuinfo": other}).cpu_name() == "implementer 0x41 part 0xfff"
    assert machine(tmp_path, {"proc/cpuinfo": "model name\t: Xeon\n"}).cpu_name() == "Xeon"
    assert machine(tmp_path, {"proc/cpuinfo": ""}).cpu_name() == "unknown aarch64 CPU"
    # A sandbox hides /proc/cpuinfo, or what matters of it; the register itself is in /sys.
    midr = {"sys/devices/system/cpu/cpu0/regs/identification/midr_el1": "0x00000000411fd401\n"}
    assert machine(tmp_path, {"proc/cpuinfo": "processor\t: 0\n", **midr}).cpu_name() == "Neoverse V1 (Graviton3)"


def arm_cpuinfo(*cores: tuple[int, int], model: str = "") -> str:
    """As Linux prints it on aarch64: one block for each CPU."""
    return "\n".join(
        f"processor\t: {index}\n{model}BogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm aes\n"
        f"CPU implementer\t: {implementer:#04x}\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part:#05x}\n"
        "CPU revision\t: 1\n"
        for index, (implementer, part) in enumerate(cores)
    )


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (arm_cpuinfo((0x41, 0xD0C)), "Neoverse N1 (Graviton2, Ampere Altra)"),
        (arm_cpuinfo((0x41, 0xD40)), "Neoverse V1 (Graviton3)"),
        (arm_cpuinfo((0x41, 0xD49)), "Neoverse N2 (Yitian 710)"),
        (COBALT100, "Cobalt 100 (Neoverse N2)"),
        (arm_cpuinfo((0x41, 0xD4F)), "Neoverse V2 (Graviton4, Axion C4A, Grace)"),
        (arm_cpuinfo((0x41, 0xD84)), "Neoverse V3 (Graviton5)"),
        (arm_cpuinfo((0x41, 0xD8E)), "Neoverse N3 (Axion N4A)"),
        (arm_cpuinfo((0xC0, 0xAC3)), "AmpereOne"),
        # Many cores, of one kind.
        (arm_cpuinfo(*[(0x41, 0xD40)] * 128), "Neoverse V1 (Graviton3)"),
        # Of several kinds, and not in groups.
        (arm_cpuinfo(*[(0x41, 0xD05), (0x41, 0xD0B)] * 4), "4x Cortex-A55 + 4x Cortex-A76"),
        (arm_cpuinfo(*[(0x41, 0xD99)] * 4, (0x41, 0xD85)), "4x implementer 0x41 part 0xd99 + 1x Cortex-X925"),
        # Without a known name, and of a known implementer: a Mac's virtual machine.
        (arm_cpuinfo((0x41, 0xD99)), "implementer 0x41 part 0xd99"),
        (arm_cpuinfo((0x00, 0x000)), "implementer 0x00 part 0x000"),
        (arm_cpuinfo((0x61, 0x000)), "Apple implementer 0x61 part 0x000"),
        # What a kernel prints for 32-bit programs is no name; a vendor's own is.
        (arm_cpuinfo((0x41, 0xD0C), model=COMPAT), "Neoverse N1 (Graviton2, Ampere Altra)"),
        (arm_cpuinfo((0x70, 0x999), model=COMPAT), "Phytium implementer 0x70 part 0x999"),
        (arm_cpuinfo((0x70, 0x999), model="model name\t: FT-2000+/64\n"), "FT-2000+/64"),
        # An old kernel: all processors first, then the numbers once.
        (OLD_KERNEL, "Cortex-A53"),
        ("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 7571 \nmodel name\t: other\n", "AMD EPYC 7571"),
        ("model name\t:\nflags\t: fpu\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_cpu_names(cpuinfo: str, name: str | None) -> None:
    assert name_cpu(cpuinfo) == name


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
    command = ("-m", "torch_ext.doctor")
    process = warm.python("torch").run(*command, "--json", complete=False)
    report = json.loads(process.stdout)
    assert process.returncode == (1 if report["status"] == "FAIL" else 0)
    states = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert states["extension"] == states["self-test"] == states["torch"] == "OK"
    assert report["isa_report"]["isa"] == torch_ext.isa_report()["isa"]
    kernel = torch_ext.isa_report()["int8_kernels"][-1]
    detail = next(finding["detail"] for finding in report["findings"] if finding["name"] == "kernels")
    assert kernel.endswith(re.search(r"int8 with (\w+)", detail)[1])
    table = warm.python("torch").run(*command, complete=False)
    assert table.returncode == process.returncode
    assert all(name in table.stdout for name in states)


@pytest.mark.anywhere
def test_forced_isa_is_told() -> None:
    best = next(entry["name"] for entry in torch_ext.isa_report()["candidates"] if entry["supported"])
    if best == "portable":
        expected = "OK"
    else:
        expected = "WARN"
    process = warm.python("torch").run(
        "-m", "torch_ext.doctor", "--json", env={**os.environ, "TORCH_EXT_ISA": "portable"}
    )
    report = json.loads(process.stdout)
    finding = next(finding for finding in report["findings"] if finding["name"] == "kernels")
    assert finding["status"] == expected or "no bf16" in finding["detail"]
    assert finding["detail"].startswith("portable on ")


@pytest.mark.anywhere
def test_runs_where_the_extension_does_not_load(tmp_path: Path) -> None:
    package = Path(torch_ext.__file__).parent
    copy = tmp_path / "torch_ext"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("csrc", "*.so", "__pycache__"))
    # The copy comes before what is on the path already, where torch may be.
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return warm.python("torch").run(*arguments, env=environ, cwd=tmp_path)

    process = python("-m", "torch_ext.doctor", "--json")
    assert process.returncode == 1, process.stderr
    report = json.loads(process.stdout)
    finding = next(finding for finding in report["findings"] if finding["name"] == "extension")
    assert finding["status"] == "FAIL"
    assert "_C.abi3.so is missing" in finding["detail"]
    process = python("-c", "import torch_ext; torch_ext.optimize")
    assert process.returncode == 1
    assert "ImportError: torch_ext: " in process.stderr
    assert "pip install --no-build-isolation" in process.stderr

    (copy / "_C.abi3.so").write_bytes(b"not a library")
    process = python("-m", "torch_ext.doctor")
    assert process.returncode == 1
    assert "cannot load" in process.stdout


@pytest.mark.anywhere
def test_runs_without_torch(tmp_path: Path) -> None:
    # As where it is not installed: neither found nor imported.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "sys.modules['torch'] = None\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = run("--json", PYTHONPATH=path)
    assert process.returncode in (0, 1), process.stderr  # What is wrong with this machine apart from that.
    report = json.loads(process.stdout)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert findings["torch"]["status"] == "WARN"
    assert findings["runtime"]["status"] == "OK"
    assert report["isa_report"]["isa"] in findings["kernels"]["detail"]
    assert findings["torch"]["detail"].startswith("not installed")
    assert findings["torch"]["advice"] == "pip install 'torch-ext[torch]'"
    assert "memory" in findings
