"""Opens a variant of a bundle, for the exporter to verify and for the server."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Protocol

from ..bundle import BundleError, Manifest
from ..extras import how_to_install
from ..tasks import open_task
from .engine import Engine, Image

__all__ = ["Image", "load_engine", "open_engine"]


_INSTALL = {
    "onnxruntime": how_to_install("onnx"),
    "torch": "pip install 'torch>=2.10' numpy",
    "torch_ext": how_to_install("serve"),
}
"""How to get what an engine needs."""


class _Kind(Protocol):
    """What is opened: a `bundle.Variant`, or the `bundle.VariantKind` of one that is being made."""

    @property
    def file(self) -> str: ...

    @property
    def engine(self) -> str: ...

    @property
    def dtype(self) -> str: ...


def open_engine(
    manifest: Manifest,
    variant: _Kind,
    threads: int,
    token_text: Callable[[int], str] = str,
    *,
    image: Image | None = None,
    shared: bool = False,
) -> Engine:
    """Opens a variant of a bundle.

    Args:
        manifest: The bundle; its `files` and `variants` need not be known yet.
        variant: Which variant.
        threads: Threads of the engine.
        token_text: How a token id reads, for answers that hold tokens.
        image: Weights of the variant that another process has loaded; None: from its file.
        shared: Keep the weights where other processes can map them, if the engine can; see `Engine.share`.

    Raises:
        BundleError: The weights do not fit the manifest, or their engine is not installed.
    """
    task = open_task(manifest, token_text)
    path = manifest.root / variant.file
    try:
        if variant.engine == "onnxruntime":
            from .onnx import OnnxEngine

            return OnnxEngine(path, variant.dtype, threads, task)
        if variant.engine == "torch":
            from .program import ProgramEngine

            return ProgramEngine(path, threads, task)
        from .torch_ext import TorchExtEngine

        if image is not None:
            return TorchExtEngine.map(image, threads, task)
        return TorchExtEngine.load(path, variant.dtype, threads, task, shared=shared)
    except ImportError as error:
        how = _INSTALL[variant.engine]
        raise BundleError(
            f"{variant.file} needs {variant.engine}, which cannot be imported ({error}); {how}, or choose another "
            "variant"
        ) from error


def load_engine(
    manifest: Manifest,
    variant: _Kind,
    threads: int,
    token_text: Callable[[int], str] = str,
    *,
    image: Image | None = None,
    shared: bool = False,
) -> tuple[Engine, str]:
    """Opens a variant of a bundle and makes it ready to serve: it has run once.

    Args:
        manifest: The bundle.
        variant: Which variant of it.
        threads: Threads of the engine.
        token_text: How a token id reads, for answers that hold tokens.
        image: See `open_engine`.
        shared: See `open_engine`.

    Returns:
        The engine, and what runs it for the start-up line.

    Raises:
        BundleError: See `open_engine`.
        FloatingPointError: The model computes NaN or infinity for nothing but special tokens.
    """
    engine = open_engine(manifest, variant, threads, token_text, image=image, shared=shared)
    special = [token.id for name in ("cls", "mask", "sep") if (token := manifest.special_tokens[name]) is not None]
    ids = array("q", special or [0])
    for answer in engine.run([ids, ids[:-1] if len(ids) > 1 else ids], [engine.task.usual] * 2):
        if isinstance(answer, Exception):
            raise answer
    return engine, engine.isa
