"""Ray Serve and sentence-transformers, with its batches, as its documentation has it."""

from __future__ import annotations

import signal
from typing import Any

from common import BATCH, BATCH_S, announce_when_ready, arguments

options = arguments()

import ray  # noqa: E402
from ray import serve  # noqa: E402
from starlette.requests import Request  # noqa: E402


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Embedder:
    """One replica."""

    def __init__(self, model: str, threads: int) -> None:
        """Loads the model, in the replica."""
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self.model = SentenceTransformer(model, device="cpu")

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_S)
    async def embed(self, texts: list[str]) -> list[list[float]]:
        """Unit vectors."""
        found: list[list[float]] = self.model.encode(texts, batch_size=BATCH, normalize_embeddings=True).tolist()
        return found

    async def __call__(self, request: Request) -> dict[str, Any]:
        """One text."""
        return {"embeddings": [await self.embed((await request.json())["inputs"])]}


threads = {"OMP_NUM_THREADS": str(options.threads)}
ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2, runtime_env={"env_vars": threads})
serve.start(http_options={"host": "127.0.0.1", "port": options.port})
serve.run(Embedder.bind(options.model, options.threads), route_prefix="/api/embed")
announce_when_ready("Ray Serve", options.port, "/-/healthz")
signal.sigwait({signal.SIGTERM, signal.SIGINT})
serve.shutdown()
ray.shutdown()
