"""Variants of a bundle, and what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deploy.bundle.fields import ENGINES, Reader

__all__ = ["Accuracy", "Speed", "Variant"]


@dataclass(frozen=True)
class Accuracy:
    """A variant compared with transformers in fp32 on real text.

    Attributes:
        metric: `cosine` (feature-extraction, per text), `agreement` (same best label, or token: of the text, of its
            tokens, of its masks), `exact_match` (same answer) or `closeness` (regression: 1 less the relative error).
        mean: Mean of the metric over the texts.
        min: Worst text.
        texts: How many texts were compared.
        bound: Bounds that the variant had to keep, by name (`mean`, `min`, `max_prob_diff`).
        details: Other measured figures by name, such as `max_prob_diff`.
        quantiles: The metric of the texts at 0, 5, ... 100 %, the worst text first; empty in bundles that were written
            before this field existed.
    """

    metric: str
    mean: float
    min: float
    texts: int
    bound: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, float] = field(default_factory=dict)
    quantiles: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Its JSON object."""
        return {**asdict(self), "quantiles": list(self.quantiles)}

    @classmethod
    def read(cls, reader: Reader) -> Accuracy:
        """Reads its JSON object."""
        return cls(
            metric=reader.string("metric"),
            mean=reader.number("mean"),
            min=reader.number("min"),
            texts=reader.count("texts", 1),
            bound=reader.child("bound", optional=True).numbers(),
            details=reader.child("details", optional=True).numbers(),
            quantiles=reader.floats("quantiles"),
        )


@dataclass(frozen=True)
class Speed:
    """A quick measurement on the machine that exported; it says nothing about another machine.

    Attributes:
        texts_per_s: Texts per second, tokenisation not included.
        threads: Threads of the engine.
        cpu: Name of the CPU.
        batch: Texts per batch, sorted by length.
    """

    texts_per_s: float
    threads: int
    cpu: str
    batch: int

    @classmethod
    def read(cls, reader: Reader) -> Speed:
        """Reads its JSON object."""
        return cls(
            reader.number("texts_per_s"), reader.count("threads", 1), reader.string("cpu"), reader.count("batch", 1)
        )


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        name: Key in the manifest, such as `torch_ext-bf16`.
        file: Name of its weights file in the bundle.
        engine: One of `ENGINES`.
        dtype: `bf16`, `fp32` or `int8`.
        bytes: Size of everything that this variant loads.
        accuracy: Comparison with fp32; None where nobody measured it, as in a folder that was not exported.
        speed: Quick measurement, or None.
        extra_files: Other files of the bundle that it needs (external weights of an ONNX model above 2 GiB).
        quantization: What was measured to find the layers that int8 would damage too much: `kept_bf16`, names of those
            that stayed in bf16; `layers`, the damage of each; mean and min cosine with all in `int8`, all in `bf16`,
            and as `chosen`. Empty for a variant that is not quantized in this way.
        kernels: What computed `accuracy` and `speed`: the instruction set that torch_ext chose, torch's version and
            that, or ONNX Runtime's version and how it multiplies int8. None in bundles that were written before this
            field existed.
    """

    name: str
    file: str
    engine: str
    dtype: str
    bytes: int
    accuracy: Accuracy | None
    speed: Speed | None = None
    extra_files: tuple[str, ...] = ()
    quantization: Mapping[str, Any] = field(default_factory=dict)
    kernels: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object; fields that came after the first release are in it where they say something."""
        result: dict[str, Any] = {
            "file": self.file,
            "engine": self.engine,
            "dtype": self.dtype,
            "bytes": self.bytes,
            "accuracy": None if self.accuracy is None else self.accuracy.to_json(),
            "speed": None if self.speed is None else asdict(self.speed),
            "extra_files": list(self.extra_files),
        }
        if self.quantization:
            result["quantization"] = dict(self.quantization)
        if self.kernels is not None:
            result["kernels"] = self.kernels
        return result

    @classmethod
    def read(cls, name: str, reader: Reader) -> Variant:
        """Reads its JSON object; whether its files are there, and are plain names, the manifest checks."""
        speed = reader.child("speed", optional=True)
        return cls(
            name=name,
            file=reader.string("file"),
            engine=reader.choice("engine", ENGINES),
            dtype=reader.string("dtype"),
            bytes=reader.count("bytes"),
            accuracy=Accuracy.read(reader.child("accuracy")),
            speed=Speed.read(speed) if speed.value else None,
            extra_files=reader.strings("extra_files") if "extra_files" in reader.value else (),
            quantization=reader.child("quantization", optional=True).value,
            kernels=reader.get("kernels", str, optional=True),
        )
