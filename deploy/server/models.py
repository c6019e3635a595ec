"""A model that is served: its service, its engine's queue, and what is counted of it."""

from __future__ import annotations

import asyncio

from ..bundle import Manifest
from .limits.bounds import Settings
from .limits.budget import MemoryBudget
from .metrics import Metrics
from .observed import Observed
from .service import Batcher, Service, TextTokenizer
from .variants import Choice

__all__ = ["Model", "Turn"]

_LOOK_S = 0.05


class Model:
    """One of the models of a server.

    Attributes:
        batcher: Its queue and engine.
        metrics: What is counted of it.
        service: What answers.
        requests: How many requests it answers now.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: TextTokenizer,
        batcher: Batcher,
        settings: Settings,
        metrics: Metrics,
        budget: MemoryBudget,
    ) -> None:
        """Loads nothing yet: `batcher.start` does.

        Args:
            manifest: The bundle.
            tokenizer: Of the bundle.
            batcher: Its queue and engine.
            settings: Of the server, with the name of this model and its part of the threads.
            metrics: Where it is counted.
            budget: Memory of all requests of the server.
        """
        self.batcher = batcher
        self.metrics = metrics
        self.service = Service(manifest, tokenizer, batcher, settings, metrics, budget)
        self.requests = 0
        batcher.on_batch = metrics.batch

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.service.model

    def serves(self, choice: Choice, isa: str) -> None:
        """Told once, when the engine is loaded, what is served; on any thread.

        Args:
            choice: The variant, and why it was taken.
            isa: What runs it.
        """
        self.service.serves(choice, isa)

    def announce(self) -> None:
        """Shows in the metrics what is served."""
        served = self.service.served
        if served is not None:
            self.metrics.serves(self.name, served.choice.variant, self.service.manifest.task)

    async def retire(self) -> None:
        """Ends the engine once the last request is answered; no more come."""
        while self.requests:
            await asyncio.sleep(_LOOK_S)
        self.service.close()
        await self.batcher.close()


class Turn:
    """A request that is answered: the model that it asks does not end before, and counts it."""

    __slots__ = ("_observed", "model", "service")

    def __init__(self, model: Model, observed: Observed) -> None:
        self._observed = observed
        self._begin(model)

    def _begin(self, model: Model) -> None:
        self.model = model
        self.service = model.service
        self._observed.metrics = model.metrics
        model.requests += 1

    def to(self, model: Model) -> None:
        """It asks this one."""
        if model is not self.model:
            self.end()
            self._begin(model)

    def end(self) -> None:
        """It is answered."""
        self.model.requests -= 1
