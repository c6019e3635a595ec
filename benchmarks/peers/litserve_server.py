"""LitServe and sentence-transformers, with its batches."""

from __future__ import annotations

from typing import Any

from common import BATCH, BATCH_S, announce_when_ready, arguments

options = arguments()

import litserve  # noqa: E402


class Embedder(litserve.LitAPI):
    """As its documentation embeds."""

    def setup(self, device: str) -> None:
        """Loads the model, in the worker."""
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(options.threads)
        self.model = SentenceTransformer(options.model, device="cpu")

    def decode_request(self, request):
        """The text. LitServe reads annotations of this method, so it has none."""
        return str(request["inputs"])

    def predict(self, texts: list[str]) -> Any:
        """Unit vectors."""
        return self.model.encode(texts, batch_size=BATCH, normalize_embeddings=True).tolist()

    def encode_response(self, vector: list[float]) -> dict[str, Any]:
        """The answer."""
        return {"embeddings": [vector]}


if __name__ == "__main__":
    api = Embedder(max_batch_size=BATCH, batch_timeout=BATCH_S, api_path="/api/embed")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    announce_when_ready("LitServe", options.port)
    server.run(host="127.0.0.1", port=options.port, log_level="warning", generate_client_file=False)
