"""The model as a service, without HTTP: texts to token ids (`tokens`), to batches (`batching`), and results back."""

from __future__ import annotations

from .batching import Batcher
from .request import Result, Served, widths_of
from .service import Service
from .tokens import TextTokenizer

__all__ = ["Batcher", "Result", "Served", "Service", "TextTokenizer", "widths_of"]
