"""FastAPI and sentence-transformers: a function of the thread pool for each request, no batches across requests."""

from __future__ import annotations

from typing import Any

from common import announce_when_ready, arguments

options = arguments()

import fastapi  # noqa: E402
import pydantic  # noqa: E402
import torch  # noqa: E402
import uvicorn  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

torch.set_num_threads(options.threads)
model = SentenceTransformer(options.model, device="cpu")
app = fastapi.FastAPI()


class Body(pydantic.BaseModel):
    """A request."""

    inputs: str | list[str]


@app.get("/health")
def health() -> dict[str, str]:
    """Ready."""
    return {"status": "ok"}


@app.post("/api/embed")
def embed(body: Body) -> dict[str, Any]:
    """Unit vectors."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    return {"embeddings": model.encode(texts, normalize_embeddings=True).tolist()}


announce_when_ready("FastAPI and sentence-transformers", options.port)
uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)
