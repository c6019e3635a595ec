"""Which variant of a bundle is served: named by `--variant`, or the fastest here that answers as the model.

`selection` leads from the option to the variant; `choice` decides by speeds, which `measurement` has measured by a
process of its own (`measure`) and `speed_cache` keeps for the next start. Standard library only, but for that process.
"""

from __future__ import annotations

from .choice import Choice
from .measurement import LoadCancelled
from .selection import Selection, add_options

__all__ = ["Choice", "LoadCancelled", "Selection", "add_options"]
