"""Encoders without torch: the kernels and the forward pass of :class:`torch_ext.Encoder`, with threads of their own.

For programs that serve, or that start often: importing this takes milliseconds, and nothing but Python is needed.
Results are equal, bit for bit, to those of :class:`torch_ext.Encoder`. Arrays come in and go out by the buffer protocol
or DLPack: numpy's, torch's, ``array.array`` or ``memoryview``::

    from torch_ext.runtime import Encoder

    encoder = Encoder.open("bundle/encoder_bf16.safetensors")
    states = encoder.encode(ids, cu_seqlens)  # int64 [tokens], int32 [texts + 1]
    vectors = numpy.asarray(states.pool("mean", normalize=True))  # fp32 [texts, hidden_size], no copy

Programs that are not Python have the same in ``torch_ext/include/torch_ext_runtime.h``.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch_ext.states import Array, Pooling, States, integers, whole_number
from torch_ext.tensor import Tensor, element_type, shape_of

try:
    from torch_ext import _runtime
except ImportError as error:
    raise ImportError(
        f"torch_ext: cannot load the runtime ({error}): the package was not built for this environment; install a "
        "wheel, or in a checkout run pip install --no-build-isolation -e ."
    ) from error

__all__ = [
    "Array",
    "Encoder",
    "Pooling",
    "States",
    "Tensor",
    "default_threads",
    "finite_rows",
    "isa_report",
    "json_row",
]

_Options = tuple[str | None, int, tuple[int, ...], bool, bool]


class Encoder:
    """A model that is ready to run. Immutable; several threads may call it at once, which take turns on its threads.

    In a process forked from one with an encoder it works, too: it gets threads of its own there.

    Attributes:
        architecture: Where the model comes from, such as ``bert``.
        dtype: ``bf16``, ``fp32`` or ``int8``, of its matrices.
        task: What its head is for, or None.
        isa: The instruction set that its kernels are for.
        hidden_size: Width of hidden states.
        num_layers: Transformer layers.
        max_positions: The longest text, in tokens.
        vocab_size: Token ids are below this.
        type_vocab_size: Token types are below this; 0: the model has none.
        outputs: Of its head; 0: it has none.
        threads: That work on a batch, the caller's included.
        image_bytes: Memory that weights and tables take.
        embedding_size: Width of embeddings: ``hidden_size``, or ``outputs`` of a head for feature-extraction.
    """

    architecture: str
    dtype: str
    task: str | None
    isa: str
    hidden_size: int
    num_layers: int
    max_positions: int
    vocab_size: int
    type_vocab_size: int
    outputs: int
    threads: int
    image_bytes: int
    embedding_size: int

    def __init__(self, encoder: Any) -> None:
        """Users call :meth:`open`, :meth:`from_pretrained`, :meth:`open_image` or :meth:`pack`."""
        self._encoder = encoder
        self._info: dict[str, Any] = encoder.info()
        for name in type(self).__annotations__:
            setattr(self, name, self._info[name])

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        dtype: Literal["bf16", "fp32", "int8"] | None = None,
        *,
        threads: int | None = None,
        cpus: Iterable[int] = (),
        pin: bool = False,
        shared: bool = False,
    ) -> Encoder:
        """Reads what :meth:`torch_ext.Encoder.save` or the exporter wrote, and packs it for this CPU.

        Args:
            path: The file, with or without a head.
            dtype: What to run it as; None: as it was saved. Files in fp32 run as bf16, too.
            threads: That work on a batch; None: as many as the affinity and the CPU quota of the process allow.
            cpus: CPUs that the threads may run on; none named: those of the process.
            pin: Bind each thread, except the caller's, to one of ``cpus``.
            shared: Keep the weights in memory that other processes can map: :meth:`share` costs nothing then.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, a folder, of another kind or version, or holds other weights than ``dtype`` asks
                for.
            OSError: The system refuses threads or CPUs.
        """
        file = os.fsencode(path)
        if os.path.isdir(file):
            from pathlib import Path

            from torch_ext.encoder.places import folder_advice

            raise ValueError(folder_advice(Path(os.fsdecode(path))))
        return cls(_runtime.open(file, _options(dtype, threads, cpus, pin, shared)))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        dtype: Literal["bf16", "fp32"] = "bf16",
        head: str | None = "auto",
        *,
        adapter: str | None = None,
        stages: Sequence[tuple[str | os.PathLike[str], str]] = (),
        threads: int | None = None,
        cpus: Iterable[int] = (),
        pin: bool = False,
        shared: bool = False,
    ) -> Encoder:
        """Reads a folder of Hugging Face as ``save_pretrained`` writes it, and packs it for this CPU.

        Nothing but ``config.json`` and safetensors is read, which are mapped; pickles are never opened.

        Args:
            folder: Of an architecture in ``torch_ext.encoder.ARCHITECTURES``; weights of fp32, fp16 or bf16, in one
                file or in several.
            dtype: What to run it as. int8 takes ``torch_ext.Encoder.from_pretrained(folder, "int8").save(path)``.
            head: ``"text-classification"``, ``"token-classification"``, ``"question-answering"`` or ``"fill-mask"``,
                which has to be there; ``"auto"``: the one that ``config.json`` names, if it is there; None: no head.
            adapter: Of a model with LoRA adapters inside (Jina v3), the one that is merged into the weights, such as
                ``"retrieval.query"``; None: none of them.
            stages: linear stages behind the pooling, in place of a head: folders of Dense modules of
                sentence-transformers, each with its activation, ``"none"`` or another of ``ACTIVATIONS``; two at most.
            threads: See :meth:`open`.
            cpus: See :meth:`open`.
            pin: See :meth:`open`.
            shared: See :meth:`open`.

        Raises:
            FileNotFoundError: There is no such folder, no configuration, no weights, or not all files of them.
            ValueError: The architecture is not supported; a file is damaged, or a pickle; a weight is missing, is not
                finite, or has a shape that the configuration does not say.
            OSError: A file cannot be read, or the system refuses threads or CPUs.
        """
        if dtype not in ("bf16", "fp32"):
            raise ValueError(
                f"Encoder: expected dtype bf16 or fp32 for a folder of Hugging Face, got {dtype!r}; int8 takes a "
                "file of torch_ext.Encoder.from_pretrained(folder, 'int8').save(path) or of python -m deploy export"
            )
        from torch_ext.encoder.huggingface.folder import read_folder

        model = read_folder(folder, head, adapter, stages)
        tensors = [
            (name, Tensor(part.dtype, part.shape, part.data), part.mapped)
            for name, parts in model.tensors.items()
            for part in parts
        ]
        head_spec = None if model.head is None else vars(model.head)
        options = _options(dtype, threads, cpus, pin, shared)
        return cls._pack(os.fspath(folder), vars(model.spec), head_spec, tensors, options)

    @classmethod
    def open_image(
        cls,
        source: str | os.PathLike[str] | int,
        *,
        threads: int | None = None,
        cpus: Iterable[int] = (),
        pin: bool = False,
    ) -> Encoder:
        """Maps packed weights that another process shares, read-only: they are in memory once, for all.

        Args:
            source: A file that :meth:`save_image` wrote, or a descriptor that :meth:`share` gave, which stays open.
            threads: See :meth:`open`.
            cpus: See :meth:`open`.
            pin: See :meth:`open`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, of another version, not sealed, or for another kind of CPU.
        """
        where = source if isinstance(source, int) else os.fsencode(source)
        return cls(_runtime.open_image(where, _options(None, threads, cpus, pin, False)))

    @classmethod
    def pack(
        cls,
        spec: Mapping[str, Any],
        tensors: Mapping[str, Tensor | Sequence[Tensor]],
        head: Mapping[str, Any] | None = None,
        dtype: Literal["bf16", "fp32", "int8"] = "bf16",
        *,
        name: str = "the model",
        threads: int | None = None,
        cpus: Iterable[int] = (),
        pin: bool = False,
        shared: bool = False,
    ) -> Encoder:
        """Packs weights that are in memory.

        Args:
            spec: The fields of :class:`torch_ext.EncoderSpec`.
            tensors: Weights by the names of ``EncoderSpec.shapes()`` and ``HeadSpec.shapes()``, copied. One in several
                parts has them one after the other along its first dimension.
            head: The fields of :class:`torch_ext.HeadSpec`; None: no head.
            dtype: What to run it as. Weights of int8 come quantized, with ``NAME.weight_scale``.
            name: What messages call the model.
            threads: See :meth:`open`.
            cpus: See :meth:`open`.
            pin: See :meth:`open`.
            shared: See :meth:`open`.

        Raises:
            ValueError: A specification is not valid, or the weights do not fit it.
            TypeError: An argument is of another type.
        """
        for what, mapping in (("spec", spec), ("tensors", tensors)):
            if not isinstance(mapping, Mapping):
                raise TypeError(f"Encoder: expected {what} as a mapping, got {type(mapping).__name__}")
        parts: list[tuple[str, Tensor, bool]] = []
        for weight, given in tensors.items():
            group = given if isinstance(given, (list, tuple)) and not isinstance(given, Tensor) else (given,)
            parts += ((weight, part, False) for part in group)
        if not parts:
            raise ValueError(f"{name}: expected the weights of an encoder, got none")
        return cls._pack(name, spec, head, parts, _options(dtype, threads, cpus, pin, shared))

    @classmethod
    def _pack(
        cls,
        name: str,
        spec: Mapping[str, Any],
        head: Mapping[str, Any] | None,
        parts: Iterable[tuple[str, Tensor, bool]],
        options: _Options,
    ) -> Encoder:
        """Packs parts of weights, each with whether it is of a file that is mapped shared and read-only."""
        given = [
            (weight, element_type(weight, part), shape_of(weight, part), part.data, mapped)
            for weight, part, mapped in parts
        ]
        head_json = None if head is None else json.dumps(dict(head))
        return cls(_runtime.pack(name, json.dumps(dict(spec)), head_json, given, options))

    @property
    def spec(self) -> dict[str, Any]:
        """The fields of :class:`torch_ext.EncoderSpec`."""
        result: dict[str, Any] = json.loads(self._info["encoder_json"])
        return result

    @property
    def head_spec(self) -> dict[str, Any] | None:
        """The fields of :class:`torch_ext.HeadSpec`, or None."""
        text = self._info["head_json"]
        return None if text is None else json.loads(text)

    def encode(self, input_ids: Any, cu_seqlens: Any, token_type_ids: Any = None, attended: Any = None) -> States:
        """Runs a batch of texts, without the GIL.

        Args:
            input_ids: int64 ``[tokens]``, the tokens of all texts, one text after the other, special tokens included.
            cu_seqlens: int32 ``[texts + 1]``; from 0 to ``tokens``: where each text begins, and the end.
            token_type_ids: int64 ``[tokens]``; None: type 0 everywhere.
            attended: int32 ``[texts]``: of each text the first tokens that others attend to, at least one. Those behind
                them have hidden states, too, but change no other's, as in a ColBERT's query that is filled up. None:
                all.

        Raises:
            TypeError: An argument has the wrong dtype.
            ValueError: An id is out of range, ``cu_seqlens`` or ``attended`` does not fit, or a text is empty or too
                long.
        """
        types = None if token_type_ids is None else integers(token_type_ids, "q")
        keys = None if attended is None else integers(attended, "i")
        return States(self._encoder.encode(integers(input_ids, "q"), integers(cu_seqlens, "i"), types, keys))

    def share(self) -> int:
        """A descriptor of the packed weights in sealed memory, for :meth:`open_image` in another process.

        The caller passes it on (``pass_fds`` of ``subprocess``, ``socket.send_fds``) and closes it.
        """
        fd: int = self._encoder.share()
        return fd

    def save_image(self, path: str | os.PathLike[str]) -> None:
        """Writes the packed weights as a file, for :meth:`open_image` on machines of the same kind.

        Raises:
            OSError: The file cannot be written.
        """
        self._encoder.save_image(os.fsencode(path))

    def release_workspace(self) -> None:
        """Frees the memory that this encoder's threads and the caller's keep for the next batch.

        That is some MB, and more after large batches. Worth its while before a longer pause: the next batch takes
        what it needs again. Call it on the thread that calls :meth:`encode`.
        """
        self._encoder.release_workspace()

    def __repr__(self) -> str:
        head = f", task={self.task}" if self.task else ""
        return (
            f"runtime.Encoder({self.architecture}, dtype={self.dtype}, isa={self.isa}{head}, "
            f"hidden_size={self.hidden_size}, num_layers={self.num_layers}, threads={self.threads})"
        )


def isa_report() -> dict[str, Any]:
    """What this CPU can do, and which kernels are chosen: see :func:`torch_ext.isa_report`.

    Raises:
        RuntimeError: ``TORCH_EXT_ISA`` names what there is not, or what needs torch.
    """
    result: dict[str, Any] = json.loads(_runtime.isa_report())
    return result


def default_threads() -> int:
    """Threads that an encoder gets that asks for none: what the affinity and the CPU quota of the process allow."""
    count: int = _runtime.default_threads()
    return count


def json_row(row: Any) -> bytes:
    """A row of numbers as JSON, each with the fewest digits that read back as the same fp32 number.

    Args:
        row: fp32 ``[n]``, any object with the buffer protocol.

    Returns:
        Such as ``b"[0.1,-2.0,1.5e-9]"``; ``null`` stands for NaN and infinity, which JSON lacks.

    Raises:
        TypeError: The numbers are no fp32.
        ValueError: There is not one dimension.
        BufferError: They are not adjacent.
    """
    text: bytes = _runtime.json_row(row)
    return text


def finite_rows(rows: Any) -> bytes:
    """Which rows hold finite numbers only.

    Args:
        rows: fp32 ``[rows, columns]``, any object with the buffer protocol.

    Returns:
        1 for each row that does, 0 for each row with NaN or infinity.

    Raises:
        TypeError: The numbers are no fp32.
        ValueError: There are not two dimensions.
        BufferError: They are not adjacent.
    """
    finite: bytes = _runtime.finite_rows(rows)
    return finite


def _options(dtype: str | None, threads: int | None, cpus: Iterable[int], pin: bool, shared: bool) -> _Options:
    try:
        numbers = tuple(operator.index(cpu) for cpu in cpus)
    except TypeError:
        raise TypeError(f"Encoder: expected cpus as numbers of CPUs, got {cpus!r}") from None
    return dtype, 0 if threads is None else whole_number("threads", threads, 1), numbers, pin, shared
