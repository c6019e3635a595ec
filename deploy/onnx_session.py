"""How every ONNX Runtime session of a bundle is opened. Imports onnxruntime only when one is."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["saturates", "session_options"]


def saturates(cpuinfo: str, machine: str) -> bool:
    """Whether products of u8 by s8, which the int8 model is made of, saturate on a CPU.

    They are exact on ARM and on x86-64 with VNNI. Older x86-64 adds pairs of them in 16 bits.

    Args:
        cpuinfo: Content of /proc/cpuinfo; an x86-64 CPU that it does not describe counts as an old one.
        machine: Architecture, as `platform.machine` spells it.
    """
    if machine.lower() not in ("x86_64", "amd64"):
        return False
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return not (flags and {"avx512_vnni", "avx_vnni"} & set(flags[1].split()))


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options with so many threads for one operator, operators one after the other, and exact int8 products.

    Args:
        threads: Threads of the session, from 1.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    if saturates(cpuinfo, platform.machine()):
        # Exact u8 x u8 kernels. Only where they are needed: with VNNI they are 2.5 to 3 times slower than its own.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options
