"""Which linear layers a model cannot afford in int8: found by measurement on sample inputs, and kept in bf16.

The measure is the cosine of outputs, row by row, to those of the model before: embeddings, hidden states or logits.
:func:`choose_layers` decides; :func:`torch_ext.optimize` and the exporter of bundles use it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.encoder import Encoder
from torch_ext.encoder.calibrate import balanced_weights, calibrated_weights, with_random_texts
from torch_ext.encoder.huggingface.models import read_encoder
from torch_ext.encoder.spec import is_matrix, scale_name
from torch_ext.samples import Sample as Sample
from torch_ext.samples import output_rows

__all__ = [
    "AccuracyError",
    "LayerDamage",
    "Measure",
    "Mixtures",
    "Report",
    "Similarity",
    "choose_layers",
    "output_rows",
    "similarity",
]

MOST_UNITS = 64
"""Layers or groups of layers that are measured one by one, at most."""


class AccuracyError(ValueError):
    """Not even with all layers in bf16 is a model as accurate as was asked for."""


@dataclass(frozen=True)
class Similarity:
    """Cosines of outputs to those of the exact model.

    Attributes:
        mean: over all rows.
        min: of the worst row.
        acceptable: whether further bounds are kept that the caller has.
    """

    mean: float
    min: float
    acceptable: bool = True

    def __str__(self) -> str:
        return f"mean {self.mean:.6f} min {self.min:.6f}"


Measure = Callable[[frozenset[str]], Similarity]
"""Computes how similar a model is, all of whose layers are int8 but those named, which are bf16."""


@dataclass(frozen=True)
class LayerDamage:
    """What int8 does to a model when one layer, or a group of them, is quantized alone.

    Attributes:
        names: the layers.
        damage: mean cosine with all layers in bf16, less the mean cosine with these in int8.
        kept: whether they stay in bf16.
    """

    names: tuple[str, ...]
    damage: float
    kept: bool


@dataclass(frozen=True)
class Report:
    """What was measured, and what follows from it. As text: a table.

    Attributes:
        accuracy: the mean cosine that was asked for; None: none, but the caller's own bounds.
        int8: all layers in int8.
        bf16: all layers in bf16; None if that was not needed.
        chosen: with the layers in bf16 that are to be kept so.
        layers: the most damaging first; empty if all may be int8.
        passes: how often the sample was run.
    """

    accuracy: float | None
    int8: Similarity
    bf16: Similarity | None
    chosen: Similarity
    layers: tuple[LayerDamage, ...]
    passes: int

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the layers to keep in bf16, the most damaging first."""
        return tuple(name for layer in self.layers if layer.kept for name in layer.names)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""

        def pair(value: Similarity | None) -> dict[str, float] | None:
            return None if value is None else {"mean": value.mean, "min": value.min}

        return {
            "accuracy": self.accuracy,
            "int8": pair(self.int8),
            "bf16": pair(self.bf16),
            "chosen": pair(self.chosen),
            "kept_bf16": list(self.kept),
            "layers": [
                {"names": list(layer.names), "damage": layer.damage, "kept": layer.kept} for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        asked = "" if self.accuracy is None else f", {self.accuracy:g} asked for"
        lines = [f"cosine to the exact model{asked}: all layers in int8 {self.int8}"]
        if self.layers:
            lines[0] += f", all in bf16 {self.bf16}, as chosen {self.chosen}"
            titles = [_title(layer.names) for layer in self.layers]
            width = max(len("layer"), *map(len, titles))
            lines.append(f"{'layer'.ljust(width)}  damage alone  kept")
            for title, layer in zip(titles, self.layers, strict=True):
                lines.append(f"{title.ljust(width)}  {layer.damage:12.6f}  {'bf16' if layer.kept else 'int8'}")
        return "\n".join(lines)


def _title(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{_group(names[0])} ({len(names)} layers)"


def _group(name: str) -> str:
    """The transformer layer that a linear layer is in, by its name up to the first number; else its own name."""
    found = re.match(r"(.*?(?:^|\.)\d+)\.", name)
    return found[1] if found else name


def choose_layers(
    names: Sequence[str], measure: Measure, accuracy: float | None = None, rank: Measure | None = None
) -> Report:
    """Find the layers to keep in bf16, so that a model in int8 is as accurate as asked.

    If all layers in int8 fall short, the damage that each one does alone ranks them, and as many of the worst as are
    needed are kept. Where a model has more than :data:`MOST_UNITS` linear layers, they are ranked in groups, one for
    each transformer layer, and only the layers of the worst groups one by one. The number of measurements is at most
    ``MOST_UNITS + log2(len(names)) + 3``, unless there are more groups than that. Nothing is left to chance.

    Args:
        names: the linear layers, from the input to the output.
        measure: see :data:`Measure`.
        accuracy: the mean cosine to reach, above 0 and at most 1; None: ``acceptable`` alone decides.
        rank: a cheaper measure for the ranking; by default ``measure``.

    Returns:
        The report; ``report.kept`` are the layers to keep.

    Raises:
        ValueError: ``accuracy`` is out of range.
        AccuracyError: with all layers in bf16 the model is not as accurate either.
    """
    if accuracy is not None and not 0 < accuracy <= 1:
        raise ValueError(f"accuracy: expected a mean cosine above 0 and at most 1, got {accuracy}")

    def enough(value: Similarity) -> bool:
        return value.acceptable and (accuracy is None or value.mean >= accuracy)

    everything = frozenset(names)
    int8 = measure(frozenset())
    if enough(int8) or not names:
        return Report(accuracy, int8, None, int8, (), 1)
    bf16 = measure(everything)
    if not enough(bf16):
        wanted = "the bounds to be kept" if accuracy is None else f"a mean cosine of {accuracy:g}"
        raise AccuracyError(
            f"expected {wanted}, but all linear layers in bf16 reach {bf16} only, in int8 {int8}: ask for less, or "
            "leave layers in fp32"
        )
    ranking = measure if rank is None else rank
    best = bf16 if rank is None else ranking(everything)
    passes = 2 + (rank is not None)

    def damages(units: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {unit: best.mean - ranking(everything.difference(unit)).mean for unit in units}

    units = _units(names)
    found = damages(units)
    passes += len(units)
    if len(units) < len(names):
        # One by one where it matters, as far as that goes.
        for unit in sorted(units, key=lambda unit: -found[unit]):
            if passes + len(unit) <= MOST_UNITS and len(unit) > 1:
                del found[unit]
                found.update(damages((name,) for name in unit))
                passes += len(unit)
    place = {name: index for index, name in enumerate(names)}
    ranked = sorted(found, key=lambda unit: (-found[unit], place[unit[0]]))

    # The fewest of the worst that are enough; all of them are.
    low, high, chosen = 0, len(ranked), bf16
    while high - low > 1:
        middle = (low + high) // 2
        value = measure(frozenset(name for unit in ranked[:middle] for name in unit))
        passes += 1
        if enough(value):
            high, chosen = middle, value
        else:
            low = middle
    layers = tuple(LayerDamage(unit, found[unit], index < high) for index, unit in enumerate(ranked))
    return Report(accuracy, int8, bf16, chosen, layers, passes)


def _units(names: Sequence[str]) -> list[tuple[str, ...]]:
    """What is measured at first: every layer, or groups of them if there are too many."""
    if len(names) <= MOST_UNITS:
        return [(name,) for name in names]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name), []).append(name)
    return [tuple(group) for group in groups.values()]


def similarity(exact: Iterable[Tensor], found: Iterable[Tensor], acceptable: bool = True) -> Similarity:
    """Compare outputs row by row.

    Rows of one number, such as the score of a reranker, have a cosine of 1 or -1, which says nothing: those of all
    inputs are compared as one row.

    Args:
        exact: ``[rows, width]`` for each input.
        found: of the same shapes.
        acceptable: see :class:`Similarity`.

    Returns:
        The cosines; one that is not finite counts as -1.
    """
    cosines, scores = [], []
    for right, got in zip(exact, found, strict=True):
        if right.shape[-1] == 1:
            scores.append((right, got))
        else:
            cosines.append(_cosines(right, got))
    if scores:
        one, other = (torch.cat(parts).reshape(1, -1) for parts in zip(*scores, strict=True))
        cosines.append(_cosines(one, other))
    every = torch.cat(cosines)
    return Similarity(float(every.mean()), float(every.min()), acceptable)


def _cosines(exact: Tensor, found: Tensor) -> Tensor:
    first, second = exact.detach().double(), found.detach().double()
    lengths = first.norm(dim=-1) * second.norm(dim=-1)
    both_zero = (first == 0).all(dim=-1) & (second == 0).all(dim=-1)
    cosine = torch.where(both_zero, 1.0, (first * second).sum(-1) / lengths)
    return cosine.nan_to_num(-1.0, -1.0, -1.0)


class Mixtures:
    """Encoders of one model with some linear layers in bf16 and the others in int8.

    The model is quantized once; each mixture only packs what is there.
    """

    def __init__(self, model: nn.Module, texts: tuple[Tensor, Tensor] | None = None) -> None:
        """Take the encoder out of a Hugging Face model.

        Args:
            model: as for :meth:`torch_ext.Encoder.from_transformers`.
            texts: ``input_ids``, i64 ``[T]``, and ``cu_seqlens``, i32 ``[B + 1]``, to round the weights for: see
                :mod:`torch_ext.encoder.calibrate`. A model should not be judged by the same texts. None: each weight is
                rounded to the nearest step, as :meth:`torch_ext.Encoder.from_transformers` does.

        Raises:
            TypeError, ValueError: as for :meth:`torch_ext.Encoder.from_transformers`.
        """
        self.spec, weights = read_encoder(model)
        self.names = tuple(name.removesuffix(".weight") for name in self.spec.shapes() if is_matrix(name))
        if texts is None:
            balanced = Encoder.balanced(self.spec, weights)
            self._int8 = Encoder(self.spec, balanced, "int8").weights()
        else:
            texts = with_random_texts(self.spec, *texts)
            balanced = balanced_weights(self.spec, weights, *texts)
            self._int8 = calibrated_weights(self.spec, balanced, *texts)
        # Those that balancing left alone are the model's own, which is in memory anyway.
        self._wide = {
            name: tensor if tensor is weights[name] else tensor.bfloat16()
            for name, tensor in balanced.items()
            if is_matrix(name)
        }
        self._biases = {name: tensor for name, tensor in balanced.items() if name.endswith(".bias")}

    def __call__(self, kept: Iterable[str]) -> Encoder:
        """The encoder with the named layers in bf16.

        Raises:
            ValueError: a name is not that of a linear layer.
        """
        names = tuple(kept)
        weights = dict(self._int8)
        for name in names:
            matrix = f"{name}.weight"
            if matrix in self._wide:
                weights[matrix] = self._wide[matrix]
                del weights[scale_name(matrix)]
                weights[f"{name}.bias"] = self._biases[f"{name}.bias"]
        return Encoder(self.spec, weights, "int8", names)
