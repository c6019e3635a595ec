"""A bundle that was loaded once, and the workers that serve it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .child import Child
from .cpus import Plan
from .job import Job

__all__ = ["Generation"]


@dataclasses.dataclass
class Generation:
    """A bundle that was loaded, and who serves it.

    Attributes:
        values: What the process that prepared it says of it.
        image: A descriptor of its weights; None: each worker loads its own.
        children: Workers by their index.
    """

    values: Mapping[str, Any]
    image: int | None
    children: dict[int, Child] = dataclasses.field(default_factory=dict)

    def close(self) -> None:
        """Lets go of the weights."""
        if self.image is not None:
            os.close(self.image)
            self.image = None

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
            bundle=self.values["bundle"],
            choice=self.values["choice"],
            slot=slot,
            workers=len(plan.shares),
            threads=share.threads,
            cpus=share.cpus,
            pin=share.pin,
        )
