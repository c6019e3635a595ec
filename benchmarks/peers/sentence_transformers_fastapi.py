"""FastAPI and sentence-transformers."""

from __future__ import annotations

from typing import Any

from common import arguments

options = arguments()

import torch  # noqa: E402
from fastapi_app import serve  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

torch.set_num_threads(options.threads)
model = SentenceTransformer(options.model, device="cpu")


def vectors(texts: list[str]) -> Any:
    """Unit vectors."""
    return model.encode(texts, normalize_embeddings=True)


serve("FastAPI and sentence-transformers", options.port, vectors)
