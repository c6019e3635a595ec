"""Which variant a server takes when `--variant` names none: the fastest here that answers as the model does.

If no variant is so close to the model, it is the fastest one that keeps its bound.

Standard library only. `measure` finds the speeds, `speed_cache` keeps them; this module decides.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...bundle import VARIANTS, Accuracy, Manifest
from ...tasks import TASKS
from ...tasks.bounds import in_words, missed

__all__ = ["AUTO", "TIE", "Choice", "candidates", "fastest", "misses"]

AUTO = "auto"
"""Value of `--variant` that lets the server choose."""

TIE = 0.05
"""Speeds that differ by less are equal: repeated measurements on a busy machine scatter as much."""

_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torch_ext": ("torch_ext",),
    "torch": ("torch", "torch_ext", "numpy"),
    "onnxruntime": ("onnxruntime",),
}
_DIGITS = 5
"""Digits of an error that count: what is below is rounding of fp32."""


@dataclass(frozen=True)
class Choice:
    """A variant, and why it was taken.

    Attributes:
        variant: Its name.
        by: `option` (`--variant`), `only` (the only one that can run), `measurement`, `cache` (a measurement of an
            earlier start), or `default` (nothing could be measured).
        texts_per_s: Measured speed of every candidate, the fastest first.
        left_out: Variants that were not candidates or could not be measured, with the reason.
    """

    variant: str
    by: str
    texts_per_s: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """For the start line, such as `measured: onnx-int8 82.9, torch_ext-bf16 58.4 texts/s`."""
        speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in self.texts_per_s.items()) + " texts/s"
        text = {
            "option": "by --variant",
            "only": "the only variant that can be served",
            "measurement": f"measured: {speeds}",
            "cache": f"measured at an earlier start: {speeds}",
            "default": "not measured",
        }[self.by]
        return text + "".join(f"; without {name}: {reason}" for name, reason in self.left_out.items())


def misses(accuracy: Accuracy, bounds: Mapping[str, float] | None = None) -> str:
    """The bounds that a variant misses by its manifest, such as `mean 0.91 < 0.985`; empty if it keeps all.

    Args:
        accuracy: Of the variant.
        bounds: Other bounds than its own.
    """
    return " and ".join(in_words(*figures) for figures in missed(accuracy, bounds))


def candidates(manifest: Manifest) -> tuple[list[str], dict[str, str]]:
    """The variants of a bundle that may be served without being asked for.

    Args:
        manifest: The bundle. Files of its variants may be missing.

    Returns:
        Names in the order of `VARIANTS`, and why the others are left out: a missed bound, a missing file, an engine
        that is not installed, or answers that are not as close to the model's as those of another variant.
    """
    names, left_out = [], {}
    known = [name for name in VARIANTS if name in manifest.variants]
    for name in [*known, *(name for name in manifest.variants if name not in VARIANTS)]:
        variant = manifest.variants[name]
        absent = [file for file in (variant.file, *variant.extra_files) if not (manifest.root / file).exists()]
        packages = [package for package in _PACKAGES[variant.engine] if importlib.util.find_spec(package) is None]
        if variant.accuracy is not None and (missed := misses(variant.accuracy)):
            left_out[name] = f"its bound is missed ({missed})"
        elif absent:
            left_out[name] = f"{absent[0]} is missing"
        elif packages:
            left_out[name] = f"{packages[0]} is not installed"
        else:
            names.append(name)
    close = TASKS[manifest.task].close
    known_accuracies = {name: found for name in names if (found := manifest.variants[name].accuracy) is not None}
    far = {name: figures for name, accuracy in known_accuracies.items() if (figures := misses(accuracy, close))}
    if len(far) < len(names):
        names = [name for name in names if name not in far]
        left_out |= {name: f"not as close to the model ({figures})" for name, figures in far.items()}
    return names, left_out


def _error(accuracy: Accuracy) -> tuple[float, ...]:
    """What accuracies are ordered by, the better one first."""
    logit_error = accuracy.details.get("logit_error", 0.0)
    return round(1 - accuracy.mean, _DIGITS), round(1 - accuracy.min, _DIGITS), round(logit_error, _DIGITS)


def fastest(texts_per_s: Mapping[str, float], accuracies: Mapping[str, Accuracy]) -> str:
    """The most accurate of the variants that are as fast as the fastest, within `TIE`.

    So the choice is never slower, beyond noise, than a variant with better accuracy. Of equally accurate ones it is the
    faster.

    Args:
        texts_per_s: Speed by name, at least one.
        accuracies: Accuracy by name.
    """
    best = max(texts_per_s.values())
    level = [name for name, speed in texts_per_s.items() if speed >= (1 - TIE) * best]
    return min(level, key=lambda name: (_error(accuracies[name]), -texts_per_s[name]))
