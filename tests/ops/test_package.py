"""What the package offers, and that its parts say the same."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_ext
from tests import warm
from torch_ext._library import load_library

MODULES = (
    "torch_ext",
    "torch_ext.ops",
    "torch_ext.accelerate",
    "torch_ext.nn",
    "torch_ext.encoder",
    "torch_ext.encoder.spec",
    "torch_ext.doctor",
    "torch_ext.machine",
)

TORCH_FREE = (
    "torch_ext",
    "torch_ext.encoder",
    "torch_ext.encoder.spec",
    "torch_ext.encoder.huggingface",
    "torch_ext.encoder.huggingface.folder",
    "torch_ext.doctor",
    "torch_ext.machine",
    "torch_ext.runtime",
)


def run(program: str, *options: str, **environ: str) -> list[str]:
    """What a program prints, by lines."""
    command = [sys.executable, *options, "-c", program]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def run_after_torch(program: str) -> list[str]:
    """What a program prints, by lines, in a process that has imported torch."""
    done = warm.python("torch").run("-c", program, complete=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def without(*packages: str) -> str:
    """The beginning of a program that runs as if packages were not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({packages!r})); "


@pytest.mark.parametrize("name", MODULES)
def test_all_is_there_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{public} has no docstring"


def test_public_names_are_listed() -> None:
    for name in ("optimize", "accelerate", "isa_report", "PackedLinear", "Encoder", "Head", "linear", "matmul", "pool"):
        assert name in torch_ext.__all__


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", torch_ext.__version__)
    assert importlib.metadata.version("torch-ext") == torch_ext.__version__


@pytest.mark.anywhere
def test_import_needs_torch_only() -> None:
    program = (
        "import sys; import torch; before = set(sys.modules); import torch_ext.nn; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - {'torch_ext', 'torch'}"
        " - set(sys.stdlib_module_names)))"
    )
    assert run_after_torch(program) == ["[]"]


@pytest.mark.anywhere
def test_import_of_the_package_needs_nothing() -> None:
    program = (
        "import sys; before = set(sys.modules)\n"
        f"import {', '.join(TORCH_FREE)}\n"
        "assert torch_ext.encoder.EncoderSpec is torch_ext.EncoderSpec and 'optimize' in dir(torch_ext)\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert run(program) == ["['torch_ext']"]


LINEAR = "print(torch.ops.torch_ext.linear(torch.ones(2, 3), torch.ops.torch_ext.pack_linear_weight(torch.ones(4, 3))))"


BY_THREADS = (
    "import threading; threads = [threading.Thread(target=lambda: __import__('torch')) for _ in range(4)]; "
    "[thread.start() for thread in threads]; [thread.join() for thread in threads]"
)


@pytest.mark.anywhere
@pytest.mark.parametrize(
    "imports",
    [
        "import torch; import torch_ext",
        f"import torch_ext; {BY_THREADS}; import torch",
        "import torch_ext.encoder.spec; from torch import nn; import torch",
    ],
)
def test_ops_are_there_when_both_are_imported(imports: str) -> None:
    """In either order, with their fake kernels, and without the parts of the package that use them."""
    program = (
        "import warnings; warnings.simplefilter('error'); "
        f"{imports}; import sys; {LINEAR}; assert 'torch_ext.nn' not in sys.modules; "
        "w = torch.empty(4, 3, device='meta'); print(torch.ops.torch_ext.add_rms_norm(w, None, w[0], 1e-5).shape); "
        "print(torch.ops.torch_ext._layer_weight)"
    )
    run_it = run_after_torch if imports.startswith("import torch;") else run
    assert run_it(program)[-2:] == ["torch.Size([4, 3])", "torch_ext._layer_weight"]


@pytest.mark.anywhere
@pytest.mark.parametrize("first", ["import torch_ext.accelerate", "from torch_ext.accelerate import Acceleration"])
def test_accelerate_is_the_function(first: str) -> None:
    """An import binds submodules in their package, and one has the name of a function there."""
    program = "import torch_ext, importlib, inspect; assert inspect.isfunction(torch_ext.accelerate); "
    program += "assert inspect.ismodule(importlib.import_module('torch_ext.accelerate')); print('right')"
    assert run_after_torch(f"{first}; {program}") == run_after_torch(program) == ["right"]


@pytest.mark.anywhere
def test_names_say_what_is_missing_without_torch() -> None:
    program = without("torch") + (
        "import torch_ext, torch_ext.encoder\n"
        "assert torch_ext.EncoderSpec and torch_ext.HeadSpec and torch_ext.__version__\n"
        "uses = ('torch_ext.optimize', 'from torch_ext import Encoder', 'torch_ext.encoder.Head', 'torch_ext.nn')\n"
        "for use in uses:\n"
        "    try: exec(use)\n"
        "    except ImportError as error: print(error)\n"
        "try: torch_ext.optimise\n"
        "except AttributeError as error: print(error)\n"
    )
    missing = "needs torch>=2.10, which is not installed: pip install 'torch-ext[torch]'"
    names = ("torch_ext.optimize", "torch_ext.Encoder", "torch_ext.encoder.Head", "torch_ext.nn")
    assert run(program) == [*(f"{name} {missing}" for name in names), "module 'torch_ext' has no attribute 'optimise'"]


@pytest.mark.anywhere
@pytest.mark.parametrize("warnings", ["always", "error"])
def test_import_of_torch_survives_a_library_that_does_not_load(tmp_path: Path, warnings: str) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"not a library")
    program = (
        f"import torch_ext._library, pathlib; torch_ext._library.LIBRARY = pathlib.Path({str(library)!r})\n"
        "import torch\n"
        "assert torch.ones(2).sum() == 2\n"
        "import torch_ext\n"
        "for _ in range(2):\n"
        "    try: torch_ext.linear\n"
        "    except ImportError as error: print(error)\n"
    )
    lines = run(program, "-W", warnings)
    assert len(lines) == 2
    assert all(line.startswith(f"torch_ext: cannot load {library}") for line in lines)


@pytest.mark.anywhere
def test_pickles_of_specifications_need_no_torch() -> None:
    spec = torch_ext.HeadSpec("fill-mask", 8, "gelu", True, 1e-5, 16)
    data = pickle.dumps(spec)
    assert b"torch_ext.encoder.spec" in data  # As in pickles from before.
    program = without("torch") + f"import pickle; print(pickle.loads(bytes.fromhex({data.hex()!r})))"
    assert run(program) == [str(spec)]


@pytest.mark.compile
def test_first_use_of_a_name_may_be_traced() -> None:
    program = (
        "import torch, torch_ext\n"
        "w = torch.ops.torch_ext.pack_linear_weight(torch.ones(4, 3))\n"
        "f = torch.compile(lambda x: torch_ext.linear(x, w), fullgraph=True, backend='eager')\n"
        "print(f(torch.ones(2, 3)).sum().item())"
    )
    assert run_after_torch(program) == ["24.0"]


def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match=r"needs torch>=2.10, found 2.9.1\+cpu: pip install -U torch"):
        load_library()


def test_static_tls_error_has_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, advice in (
        ("libgomp.so: cannot allocate memory in static TLS block", "LD_PRELOAD"),
        ("invalid ELF header", "another architecture"),
        ("undefined symbol: x", "rebuild it"),
    ):

        def fail(path: str, text: str = text) -> None:
            raise OSError(text)

        monkeypatch.setattr(torch.ops, "load_library", fail)
        with pytest.raises(ImportError, match=advice):
            load_library()


def test_schemas_are_wrapped() -> None:
    """Every op that the library defines has a wrapper of the same arguments."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("torch_ext::")}
    assert "linear" in names
    for name in {name for name in names if not name.startswith("_")}:
        assert name in torch_ext.ops.__all__
        schema = getattr(torch.ops.torch_ext, name).default._schema
        code = getattr(torch_ext.ops, name).__code__
        assert code.co_varnames[: code.co_argcount] == tuple(argument.name for argument in schema.arguments)


@pytest.mark.anywhere
def test_files_need_safetensors_and_say_so(tmp_path: Path) -> None:
    program = without("safetensors") + (
        "import pathlib, torch_ext\n"
        "try: torch_ext.Head.load(pathlib.Path('none'), dtype='bf16')\n"
        "except ImportError as error: print(error)"
    )
    expected = "files of encoders need safetensors, which is not installed: pip install 'torch-ext[torch]'"
    assert run_after_torch(program) == [expected]
