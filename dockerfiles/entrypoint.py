"""Entry point of the server's images: settings as ``torch_ext.doctor`` advises them here, then a command of ``deploy``.

    python entrypoint.py COMMAND ARGUMENT...    # of python -m deploy

Sets what libraries read when they are loaded, unless the user has set it: threads, huge pages, the cache of oneDNN's
primitives, and no allocator that cannot run here. Says so in one line on standard error. The command runs in this
process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import MutableMapping

from torch_ext.machine import Machine

PRIMITIVES = "1024"
"""Shapes whose primitives oneDNN keeps: an export runs texts of many lengths."""


def settle(machine: Machine, environ: MutableMapping[str, str], has_torch: bool) -> str:
    """Sets variables of the environment.

    Args:
        machine: The container as its files show it.
        environ: Changed.
        has_torch: Whether anything in this image loads torch: its exporter.

    Returns:
        The line that says what was set.
    """
    usable, quota = machine.usable_cpus(), machine.cpu_quota()
    limit = "no quota" if quota is None else f"quota of {quota:g}"
    threads = environ.setdefault("OMP_NUM_THREADS", str(usable))
    parts = [f"threads={threads} ({limit}, {machine.affinity} CPUs)"]
    mode = re.search(r"\[(\w+)\]", machine.read("/sys/kernel/mm/transparent_hugepage/enabled") or "")
    parts.append(f"huge pages={mode[1] if mode else 'unknown'}")
    if has_torch:
        if mode and mode[1] == "madvise":
            parts[-1] += f" THP_MEM_ALLOC_ENABLE={environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')}"
        parts.append(f"LRU_CACHE_CAPACITY={environ.setdefault('LRU_CACHE_CAPACITY', PRIMITIVES)}")
    parts.append(f"allocator={_allocator(machine, environ)}")
    return ", ".join(parts)


def _allocator(machine: Machine, environ: MutableMapping[str, str]) -> str:
    """What LD_PRELOAD names; processes that are started later no longer get what cannot run here."""
    names = [name for name in re.split(r"[:\s]+", environ.get("LD_PRELOAD", "")) if name]
    bad = {name: "is not there" for name in names if "/" in name and not (machine.root / name.lstrip("/")).exists()}
    if machine.page_bytes > 4096:
        pages = f"aborts on pages of {machine.page_bytes // 1024} KiB unless built for them"
        bad |= {name: pages for name in names if "jemalloc" in name and name not in bad}
    if not bad:
        return ":".join(names) or "glibc"
    good = [name for name in names if name not in bad]
    if good:
        environ["LD_PRELOAD"] = ":".join(good)
    else:
        del environ["LD_PRELOAD"]
    return f"{':'.join(good) or 'glibc'} ({', '.join(f'{name} {why}' for name, why in bad.items())})"


def main() -> int:
    """Settles the environment and runs the command; returns its exit code."""
    line = settle(Machine(), os.environ, importlib.util.find_spec("torch") is not None)
    print(f"entry point: {line}", file=sys.stderr, flush=True)
    from deploy.__main__ import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
