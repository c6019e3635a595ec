"""Bundles that were loaded once, and the workers that serve them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from .child import Child
from .cpus import Plan
from .job import Job

__all__ = ["Generation"]


@dataclasses.dataclass
class Generation:
    """Bundles that were loaded, and who serves them.

    Attributes:
        models: What the process that prepared them says of each; see `Job`.
        files: Options whose files were copied.
        descriptors: Of these copies, and of weights that are shared; of other models, each worker loads its own.
        children: Workers by their index.
    """

    models: list[dict[str, Any]]
    files: list[str]
    descriptors: list[int]
    children: dict[int, Child] = dataclasses.field(default_factory=dict)

    def close(self) -> None:
        """Lets go of weights and copies."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []

    def job(self, argv: Sequence[str], plan: Plan, index: int, slot: int) -> Job:
        """What a worker is started for.

        Args:
            argv: Options of the server.
            plan: How the machine is split.
            index: Which of the workers it is.
            slot: Its place on the board.
        """
        share = plan.shares[index]
        return Job(
            argv=list(argv),
            models=self.models,
            files=self.files,
            slot=slot,
            workers=len(plan.shares),
            threads=share.threads,
            cpus=share.cpus,
            pin=share.pin,
        )
