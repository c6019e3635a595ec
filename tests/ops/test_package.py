"""What the package offers, and that its parts say the same."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys

import pytest
import torch

import torch_ext

MODULES = (
    "torch_ext",
    "torch_ext.ops",
    "torch_ext.accelerate",
    "torch_ext.nn",
    "torch_ext.encoder",
    "torch_ext.doctor",
    "torch_ext.machine",
)


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
        "import sys; import torch; before = set(sys.modules); import torch_ext; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - {'torch_ext', 'torch'}"
        " - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match=r"needs torch>=2.10, found 2.9.1\+cpu: pip install -U torch"):
        torch_ext._load_library()


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
            torch_ext._load_library()


def test_schemas_are_wrapped() -> None:
    """Every op that the library defines has a wrapper of the same arguments."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("torch_ext::")}
    assert "linear" in names
    for name in {name for name in names if not name.startswith("_")}:
        assert name in torch_ext.ops.__all__
        schema = getattr(torch.ops.torch_ext, name).default._schema
        code = getattr(torch_ext.ops, name).__code__
        assert code.co_varnames[: code.co_argcount] == tuple(argument.name for argument in schema.arguments)
