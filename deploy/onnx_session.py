"""How every ONNX Runtime session of a bundle is opened. Imports onnxruntime only when one is."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["kernels", "saturates", "session_options"]


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


def _saturates_here() -> bool:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    return saturates(cpuinfo, platform.machine())


def kernels(dtype: str) -> str:
    """What computes in a session with `session_options` here, such as `onnxruntime-1.32.0, u8 by s8`.

    Args:
        dtype: Of the model's weights.
    """
    import onnxruntime

    products = "" if dtype != "int8" else ", u8 by u8" if _saturates_here() else ", u8 by s8"
    return f"onnxruntime-{onnxruntime.__version__}{products}"


def session_options(threads: int, exact: bool = True) -> onnxruntime.SessionOptions:
    """Options with so many threads for one operator, operators one after the other, and exact int8 products.

    A session without them gives other results on x86-64 without VNNI: relative errors of 0.1 to 0.4 on random weights,
    where exact products have 0.05 at most.

    Args:
        threads: Threads of the session, from 1.
        exact: False leaves int8 products as ONNX Runtime has them by default, for benchmarks.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if exact and _saturates_here():
        # Weights become u8 when the model is loaded, for exact u8 x u8 kernels. Only where they are needed: with VNNI
        # they are 2.5 to 3 times slower than its own. Without it they are as fast as the saturating ones (AMD Zen 1,
        # MiniLM-L6, 16 to 480 tokens: within 2 %).
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options
