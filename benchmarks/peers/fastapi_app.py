"""What both servers on FastAPI share: a function of the thread pool for each request, no batches across requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastapi
import pydantic
import uvicorn
from common import announce_when_ready

__all__ = ["serve"]


class Body(pydantic.BaseModel):
    """A request."""

    inputs: str | list[str]


def serve(name: str, port: int, vectors: Callable[[list[str]], Any]) -> None:
    """Serves until it is stopped.

    Args:
        name: What is printed when it is ready.
        port: Of 127.0.0.1.
        vectors: Makes unit vectors of texts, an array [texts, width].
    """
    app = fastapi.FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/api/embed")
    def embed(body: Body) -> dict[str, Any]:
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        return {"embeddings": vectors(texts).tolist()}

    announce_when_ready(name, port)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
