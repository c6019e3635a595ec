"""A model on its way into a server, at start and when it is loaded again: described, verified, opened."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from ..bundle import BundleError, check_config, load_manifest
from .process import Loaded, Process
from .tei_options import fit_manifest
from .variants import LoadCancelled
from .wanted import Wanted, check_names, describe, threads_of, wanted

if TYPE_CHECKING:
    from ..engines.engine import Engine
    from .app import App
    from .models import Model
    from .service import TextTokenizer

__all__ = ["Loading", "begin"]


class Loading:
    """One model.

    Attributes:
        manifest: What is served.
        name: What clients call it.
        threads: Threads of its engine.
        selection: Which variant.
        isa: What runs it; empty until it is loaded.
    """

    def __init__(
        self, place: int, found: Wanted, arguments: argparse.Namespace, process: Process, threads: Sequence[int]
    ) -> None:
        """Describes it: names and sizes now, hashes when it is known which variants may be loaded.

        Args:
            place: Its place among the models.
            found: What the options say of it.
            arguments: All options.
            process: What is decided for this process.
            threads: Threads of the engine of each model.

        Raises:
            BundleError: The bundle cannot be served.
            UsageError: An option is wrong.
        """
        self._arguments = copy.copy(arguments)  # `fit_manifest` may choose a variant, of this model.
        self._place = place
        self._process = process
        self._all_threads = threads
        self.manifest, self._exported = describe(found.source, arguments.task)
        process.check(place, self.manifest)
        self.manifest = fit_manifest(self.manifest, self._arguments)
        self.name = found.name or self.manifest.model.name
        self.threads = threads[place]
        self.isa = ""
        self.selection = process.selection(place, self.manifest, self._arguments, self.threads)
        self._tokenizer: Future[TextTokenizer] = Future()

    def begin(self, open_known: bool = True) -> None:
        """Starts to verify and, where the variant is known, to open it, on threads.

        The hashes of large files take as long as the imports, and need another core for it; so does the engine.

        Args:
            open_known: Open it; otherwise this only verifies.
        """
        beside = ThreadPoolExecutor(2)
        files = self._process.files_of(self._place, self.selection)
        check = partial(load_manifest, self.manifest.root, verify=True, variants=files)
        self._checked = beside.submit(check) if self._exported else None
        known = self.selection.names[0] if open_known and len(self.selection.names) == 1 else None
        self._opened = beside.submit(self._open, known) if known is not None else None
        beside.shutdown(wait=False)

    def share(self) -> int | None:
        """A descriptor of the weights, after `verified`, which other processes can map; None: they cannot be shared.

        Raises:
            BundleError: The bundle cannot be served.
        """
        engine, _ = self._open(self.selection.decide().variant, shared=True)
        return engine.share()

    def _open(self, variant: str, shared: bool = False) -> tuple[Engine, str]:
        from ..engines.open import load_engine

        return load_engine(
            self.manifest,
            self.manifest.variant(variant),
            self.threads,
            lambda token: self._tokenizer.result().token(token),
            image=self._process.image(self._place, self._all_threads),
            shared=shared,
        )

    def verified(self) -> TextTokenizer:
        """Waits until the files are verified.

        Raises:
            BundleError: The bundle cannot be served.
        """
        from .service import TextTokenizer

        try:
            if self._checked is not None:
                self.manifest = fit_manifest(self._checked.result(), self._arguments)
                check_config(self.manifest)
            tokenizer = TextTokenizer.from_manifest(self.manifest)
        except ValueError as error:
            self._tokenizer.cancel()  # Nobody may wait for it any more.
            raise error if isinstance(error, BundleError) else BundleError(str(error)) from error
        self._tokenizer.set_result(tokenizer)
        return tokenizer

    def model(self, app: App) -> Model:
        """What the server serves, after `verified`; the engine is loaded by its batcher.

        Args:
            app: Of the server.
        """
        from .service import Batcher

        settings = app.settings
        tokenizer = self._tokenizer.result()
        self.selection.prepare(tokenizer.vocab_size, settings.measure_limit_s)
        batcher = Batcher(
            self._load,
            settings.max_batch_tokens,
            settings.max_queue_tokens,
            max_queue_s=1e-3 * settings.max_queue_ms,
            max_batch_s=1e-3 * settings.max_batch_ms,
            max_batch_texts=settings.max_batch_requests,
        )
        batcher.cancel_load = self.selection.cancel
        self._model = app.model(
            self.manifest, tokenizer, batcher, self._place, served_model_name=self.name, threads=self.threads
        )
        return self._model

    def cancel(self) -> None:
        """Gives up: whoever waits for it need not any more."""
        self._tokenizer.cancel()
        self.selection.cancel()

    @property
    def loaded(self) -> Loaded:
        """What it turned out to be, once it is loaded."""
        return Loaded(self.name, self.manifest.task, self.threads, self.selection.decide(), self.isa)

    def _load(self) -> Engine:
        try:
            choice = self.selection.decide()
            opened, self._opened = self._opened, None  # The engine is the batcher's alone.
            engine, self.isa = self._open(choice.variant) if opened is None else opened.result()
        except (BundleError, LoadCancelled):
            raise
        except Exception as error:  # What the engine says of a file.
            raise BundleError(
                f"{self.manifest.root}: {' or '.join(self.selection.names)} cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._model.serves(choice, self.isa)
        return engine


def begin(arguments: argparse.Namespace, process: Process, threads: int) -> list[Loading]:
    """Describes all models that the options name; `Loading.begin` goes on.

    Args:
        arguments: All options.
        process: What is decided for this process.
        threads: Of all engines together.

    Raises:
        BundleError: A bundle cannot be served.
        UsageError: An option is wrong, or two models have one name.
    """
    found = wanted(arguments)
    shares = threads_of(threads, len(found))
    loading = [Loading(place, each, arguments, process, shares) for place, each in enumerate(found)]
    check_names([each.name for each in loading])
    return loading
