"""From `--variant` to the variant that is served: named, or the only one, or found by a measurement, new or kept."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from ...bundle import VARIANTS, BundleError, Manifest
from .choice import AUTO, Choice, candidates, fastest
from .measurement import Job, Measurement
from .speed_cache import CACHE_VARIABLE, OFF, SpeedCache, default_folder, fingerprint

__all__ = ["Selection", "add_options"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--variant` and `--cache-dir`, whose values `Selection` takes."""
    parser.add_argument(
        "--variant",
        type=lambda text: text or AUTO,
        default=AUTO,
        help=f"{', '.join(VARIANTS)}; {AUTO} (default): the fastest of them that answers as the model does, or else "
        "that keeps its accuracy bound, as measured at the first start",
    )
    parser.add_argument(
        "--cache-dir",
        type=lambda text: None if text == OFF else Path(text),
        default=default_folder(os.environ),
        metavar="DIR",
        help=f"folder that keeps such measurements; {OFF}: measure at every start (default: {CACHE_VARIABLE}, else "
        "torch-ext/serve in XDG_CACHE_HOME or ~/.cache)",
    )


class Selection:
    """Which variant of a bundle is served.

    Attributes:
        names: Variants that may be loaded: the one that is known already, or all candidates.
    """

    def __init__(self, manifest: Manifest, requested: str, threads: int, cache_folder: Path | None) -> None:
        """Decides as far as that takes no time.

        Args:
            manifest: The bundle.
            requested: Name of a variant, or `AUTO`.
            threads: Threads of the engine.
            cache_folder: Where measurements are kept, or None.

        Raises:
            BundleError: No such variant, or none that can be served.
        """
        self._manifest = manifest
        self._threads = threads
        self._choice: Choice | None = None
        self._measurement: Measurement | None = None
        self._cache: SpeedCache | None = None
        self._left_out: dict[str, str] = {}
        if requested != AUTO:
            self.names = [manifest.variant(requested).name]
            self._choice = Choice(requested, "option")
            return
        self.names, self._left_out = candidates(manifest)
        if not self.names:
            raise self._none(self._left_out)
        if all(manifest.variants[name].accuracy is None for name in self.names):
            # A folder that was not exported: there are no bounds to keep, and no figures to choose by.
            self.names = [name for name in manifest.variants if name in self.names][:1]
            self._choice = Choice(self.names[0], "default", {}, self._left_out)
            return
        if len(self.names) == 1:
            self._choice = Choice(self.names[0], "only", {}, self._left_out)
            return
        self._cache = SpeedCache(cache_folder, fingerprint(manifest, self.names, threads))
        if (kept := self._cache.load()) is not None:
            speeds, failed = kept
            self._choice = self._best("cache", speeds, failed)
            self.names = [self._choice.variant]

    @classmethod
    def settled(cls, manifest: Manifest, choice: Choice) -> Selection:
        """One that was decided by another process."""
        selection = cls(manifest, choice.variant, 1, None)
        selection._choice = choice
        return selection

    def prepare(self, vocab_size: int, limit_s: float) -> None:
        """Makes ready to measure, if there is anything to measure, so that `cancel` works from now on.

        Args:
            vocab_size: Token ids are below it.
            limit_s: Most time for the measurement.
        """
        if self._choice is None:
            job = Job(str(self._manifest.root), tuple(self.names), self._threads, vocab_size)
            self._measurement = Measurement(job, limit_s)

    def cancel(self) -> None:
        """Ends a measurement; `decide` raises `LoadCancelled` then. On any thread."""
        if self._measurement is not None:
            self._measurement.cancel()

    def decide(self) -> Choice:
        """The choice, after a measurement if it takes one; `prepare` was called.

        Raises:
            LoadCancelled: `cancel` was called.
            BundleError: No variant runs on this machine.
        """
        if self._choice is None:
            assert self._measurement is not None
            outcome = self._measurement.run()
            left_out = {**outcome.failed, **outcome.unmeasured}
            if outcome.texts_per_s:
                self._choice = self._best("measurement", outcome.texts_per_s, left_out)
                if outcome.lasting and self._cache is not None:
                    self._cache.save(outcome.texts_per_s, left_out)
            elif outcome.unmeasured:
                first, *_ = outcome.unmeasured
                del left_out[first]
                self._choice = Choice(first, "default", {}, {**self._left_out, **left_out})
            else:
                raise self._none({**self._left_out, **left_out})
        return self._choice

    def _best(self, by: str, speeds: Mapping[str, float], left_out: Mapping[str, str]) -> Choice:
        variants = self._manifest.variants
        accuracies = {name: known for name in speeds if (known := variants[name].accuracy) is not None}
        ranked = dict(sorted(speeds.items(), key=lambda item: -item[1]))
        return Choice(fastest(speeds, accuracies), by, ranked, {**self._left_out, **left_out})

    def _none(self, left_out: Mapping[str, str]) -> BundleError:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        return BundleError(
            f"{self._manifest.root}: expected a variant that runs here and keeps its bound, found none ({reasons}); "
            "install what is missing, export the model again, or name one by --variant"
        )
