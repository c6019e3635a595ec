"""Memory of `python -m deploy export`, step by step, above that of the libraries.

    python benchmarks/export_memory.py FOLDER -o DIR [options of export]

Numbers are in units of the model's size in fp32. Anonymous memory is what a process needs; resident memory has pages of
mapped files besides, which the system takes back when it needs them.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_POLL_S = 0.01
_FIELDS = ("RssAnon", "VmRSS")


def _memory() -> tuple[int, ...]:
    """Bytes of anonymous and of resident memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[field].split()[0]) << 10 for field in _FIELDS)


def main(arguments: list[str]) -> int:
    """Runs an export and prints a table."""
    import torch_ext.ops  # noqa: F401 - part of what is there before
    from deploy.bundle import VARIANTS
    from deploy.export import cli, pipeline
    from deploy.export.needs import import_libraries, onnx_missing
    from deploy.export.progress import Progress

    import_libraries([name for name in VARIANTS if VARIANTS[name].engine == "torch_ext" or onnx_missing() is None])
    from transformers import AutoModel, AutoTokenizer  # noqa: F401 - imported when they are first used

    before = _memory()
    peaks: dict[str, list[int]] = {}
    title = "start"
    step = Progress.step
    parameters = 0
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            found = [now - then for now, then in zip(_memory(), before, strict=True)]
            peaks[title] = [max(pair) for pair in zip(found, peaks.get(title, found), strict=True)]

    @contextlib.contextmanager
    def watched(self: Progress, name: str, *rest: Any, **named: Any) -> Iterator[Any]:
        nonlocal title
        title = name
        with step(self, name, *rest, **named) as said:
            yield said

    def counted(state: pipeline.Export) -> None:
        nonlocal parameters
        loaded(state)
        parameters = state.parameters

    loaded = pipeline.STAGES[0].run
    pipeline.STAGES = (pipeline.STAGES[0]._replace(run=counted), *pipeline.STAGES[1:])
    Progress.step = watched  # type: ignore[method-assign, assignment]
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    code = cli.main(arguments)
    over.set()
    thread.join()
    if code == 0:
        print(f"\n{parameters * 4 / 1e6:.0f} MB in fp32; times that:\nanonymous  resident  step")
        for name, values in [*peaks.items(), ("peak", [max(pair) for pair in zip(*peaks.values(), strict=True)])]:
            anonymous, resident = (value / (parameters * 4) for value in values)
            print(f"{anonymous:9.2f}  {resident:8.2f}  {name}")
    return code


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(
            f"usage: export_memory.py FOLDER -o DIR [OPTION ...]\n\n{__doc__}\nOptions: python -m deploy export --help"
        )
        sys.exit()
    sys.exit(main(sys.argv[1:]))
