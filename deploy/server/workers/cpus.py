"""Which CPUs each worker gets: whole cores, and never cores behind two level-3 caches if that can be avoided.

A worker of 4 to 8 CPUs is where short texts still scale (docs/threads.md), and cores behind two caches pay for every
row of activations that one hands to the other. So `auto` means as few workers as give each at most 8 CPUs, for every
level-3 cache by itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_ext.machine import Machine

__all__ = ["AUTO", "Plan", "Share", "caches", "plan"]

AUTO = "auto"

MOST_CPUS = 8
"""CPUs of one worker that `auto` starts."""

Core = tuple[int, ...]
"""The CPUs (hardware threads) of one core."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What one worker gets.

    Attributes:
        threads: Threads of its engine.
        cpus: CPUs that it is bound to; none: it is not bound.
    """

    threads: int
    cpus: tuple[int, ...] = ()

    @property
    def pin(self) -> bool:
        """Whether each thread of the engine has a CPU of its own, which it can be bound to."""
        return self.threads == len(self.cpus)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all workers get.

    Attributes:
        shares: One for each worker.
        reason: For the start line, where the number of workers was found here, or is above that of CPUs; else empty.
    """

    shares: tuple[Share, ...]
    reason: str = ""

    @property
    def threads(self) -> int:
        """Most threads of a worker."""
        return max(share.threads for share in self.shares)

    def __str__(self) -> str:
        """For the start line, such as `workers=4 (auto: 32 CPUs, 4 level-3 caches) threads=8`."""
        each = sorted({share.threads for share in self.shares})
        threads = str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}"
        reason = f" ({self.reason})" if self.reason else ""
        return f"workers={len(self.shares)}{reason} threads={threads}"


def parse_list(text: str) -> tuple[int, ...]:
    """The numbers of a list as Linux writes it: `0-3,8` are 0, 1, 2, 3 and 8; empty if it is none."""
    numbers: list[int] = []
    try:
        for part in filter(None, text.strip().split(",")):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    except ValueError:
        return ()
    return tuple(numbers)


def _groups(machine: Machine, cpus: Iterable[int], file: str) -> list[tuple[int, ...]]:
    """CPUs by the list that a file of each names; none if it is missing for one of them."""
    groups: dict[tuple[int, ...], None] = {}
    for cpu in cpus:
        group = parse_list(machine.read(f"/sys/devices/system/cpu/cpu{cpu}/{file}") or "")
        if cpu not in group:
            return []
        groups[group] = None
    return list(groups)


def _nodes(machine: Machine) -> list[tuple[int, ...]]:
    """CPUs by node of memory."""
    online = parse_list(machine.read("/sys/devices/system/node/online") or "")
    return [parse_list(machine.read(f"/sys/devices/system/node/node{node}/cpulist") or "") for node in online]


def _inside(groups: Iterable[Sequence[int]], cpus: Sequence[int]) -> list[tuple[int, ...]]:
    """The parts of groups that are among some CPUs; nothing unless every CPU is in exactly one group."""
    parts = [part for group in groups if (part := tuple(cpu for cpu in group if cpu in set(cpus)))]
    return parts if sorted(cpu for part in parts for cpu in part) == sorted(cpus) else []


def caches(machine: Machine, cpus: Sequence[int]) -> list[list[Core]]:
    """Cores by level-3 cache; where those are not known, by node of memory; else all in one group.

    Virtual machines that give every CPU a level-3 cache of its own say nothing of the chip: their caches do not count.

    Args:
        machine: Whose files are read.
        cpus: That the process may use.
    """
    found = _groups(machine, cpus, "cache/index3/shared_cpu_list")
    if all(len(group) == 1 for group in found):
        found = []
    cores = _inside(_groups(machine, cpus, "topology/thread_siblings_list"), cpus) or [(cpu,) for cpu in cpus]
    for groups in (_inside(found, cpus), _inside(_nodes(machine), cpus)):
        split = [[core for core in cores if core[0] in group] for group in groups]
        if split and all(set(core) <= set(group) for group, own in zip(groups, split, strict=True) for core in own):
            return split
    return [cores]


def _parts(cores: Sequence[Core], count: int) -> list[tuple[int, ...]]:
    """Cores in as many runs of about equal length, as CPUs."""
    bounds = [len(cores) * part // count for part in range(count + 1)]
    return [tuple(cpu for core in cores[start:stop] for cpu in core) for start, stop in itertools.pairwise(bounds)]


def _counts(groups: Sequence[Sequence[Core]], workers: int) -> list[int]:
    """How many workers each group gets, by its number of cores: at least one, at most one for each core."""
    counts = [1] * len(groups)
    for _ in range(workers - len(groups)):
        open_ = [index for index, group in enumerate(groups) if counts[index] < len(group)]
        counts[max(open_, key=lambda index: len(groups[index]) / (counts[index] + 1))] += 1
    return counts


def _merged(groups: Sequence[list[Core]], workers: int) -> list[list[Core]]:
    """Fewer groups, each of several whole ones that stand beside each other."""
    bounds = [len(groups) * part // workers for part in range(workers + 1)]
    return [[core for group in groups[start:stop] for core in group] for start, stop in itertools.pairwise(bounds)]


def plan(
    workers: int | None,
    threads: int | None,
    machine: Machine,
    cpus: Sequence[int] | None = None,
) -> Plan:
    """Splits the CPUs of this process.

    Workers are bound where the CPUs are the process's own: without a quota, or with one that is no less than the CPUs
    of its cpuset. Under a smaller quota the CPUs are shared with other containers, which would bind themselves to the
    same ones; then the quota is divided, and the system places the threads.

    Fewer workers than level-3 caches get several whole ones each, since the rest of the machine would be idle
    otherwise; `--threads` that fit behind one cache keep each worker behind one.

    Args:
        workers: How many; None: as many as the CPUs ask for.
        threads: Of each worker; None: as many as it has CPUs.
        machine: What it shows of CPUs and quota.
        cpus: CPUs that the process may run on; None: as the system says.
    """
    allowed = sorted(os.sched_getaffinity(0) if cpus is None else cpus)
    quota = machine.cpu_quota()
    if quota is not None and quota < len(allowed):
        usable = max(1, math.floor(quota))
        count = workers or _auto(usable, threads)
        reason = _too_many(count, usable) if workers else f"{AUTO}: a quota of {quota:g} CPUs"
        return Plan((Share(threads or max(1, usable // count)),) * count, reason)
    groups = caches(machine, allowed)
    count = workers or sum(_auto(sum(map(len, group)), threads) for group in groups)
    caches_ = f", {len(groups)} level-3 caches" if len(groups) > 1 else ""
    reason = "" if workers else f"{AUTO}: {len(allowed)} CPU{'s' * (len(allowed) > 1)}{caches_}"
    if count > sum(map(len, groups)):  # Cores would have to be shared.
        reason = reason or _too_many(count, len(allowed))
        return Plan((Share(threads or max(1, len(allowed) // count)),) * count, reason)
    whole = groups
    if count < len(groups):
        groups = _merged(groups, count)
    parts: list[tuple[int, ...]] = []
    for group, share in zip(groups, _counts(groups, count), strict=True):
        parts += _parts(group, share)
    if threads is not None and count < len(whole):
        alone = [tuple(cpu for core in group for cpu in core) for group in whole]
        fitting = [
            next((own for own in alone if set(own) <= set(part) and len(own) >= threads), part) for part in parts
        ]
        parts = fitting
    return Plan(tuple(Share(threads or len(part), part) for part in parts), reason)


def _too_many(workers: int, cpus: int) -> str:
    return f"more than {cpus} CPU{'s' * (cpus > 1)}" if workers > cpus else ""


def _auto(cpus: int, threads: int | None) -> int:
    """How many workers so many CPUs ask for."""
    return max(1, -(-cpus // MOST_CPUS) if threads is None else cpus // threads)
