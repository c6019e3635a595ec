"""BentoML and sentence-transformers, with its adaptive batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    from common import announce_when_ready, arguments

    options = arguments()
    os.environ["PEER_MODEL"] = options.model
    os.environ["PEER_THREADS"] = str(options.threads)
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    announce_when_ready("BentoML", options.port, "/readyz")
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_server:Embedder"]
    command += ["--host", "127.0.0.1", "--port", str(options.port)]
    sys.exit(subprocess.call(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
else:
    import bentoml
    from common import BATCH

    @bentoml.service(workers=1, traffic={"timeout": 60}, metrics={"enabled": False})
    class Embedder:
        """As its documentation embeds."""

        def __init__(self) -> None:
            """Loads the model, in the worker."""
            import torch
            from sentence_transformers import SentenceTransformer

            torch.set_num_threads(int(os.environ["PEER_THREADS"]))
            self.model = SentenceTransformer(os.environ["PEER_MODEL"], device="cpu")

        @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=60_000, route="/api/embed")
        def embed(self, texts: list[str]) -> list[list[float]]:
            """Unit vectors."""
            found: list[list[float]] = self.model.encode(texts, batch_size=BATCH, normalize_embeddings=True).tolist()
            return found
