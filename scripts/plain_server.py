"""What most people start with, to compare with: Flask and transformers in fp32, one request after the other.

The same paths, requests and answers as ``python -m deploy serve``, so that the same load test runs against it::

    python scripts/plain_server.py MODEL --threads 2 --port 8001
"""

from __future__ import annotations

import argparse
import logging
import threading
from typing import Any

import flask
import torch
import transformers
from werkzeug.serving import make_server

AUTO_MODELS = {
    "feature-extraction": transformers.AutoModel,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "fill-mask": transformers.AutoModelForMaskedLM,
}


class Plain:
    """A model as transformers' own documentation runs it."""

    def __init__(self, model: str, task: str, max_tokens: int) -> None:
        """Loads the model in fp32."""
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.model = AUTO_MODELS[task].from_pretrained(model).eval()
        self.task = task
        self.max_tokens = max_tokens
        self.lock = threading.Lock()

    def run(self, texts: list[str], top_k: int) -> dict[str, Any]:
        """Computes the answer to one request.

        Args:
            texts: Inputs of the request, padded to the longest.
            top_k: Candidates for each mask.
        """
        with self.lock, torch.inference_mode():
            encoded = self.tokenizer(
                texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            mask = encoded["attention_mask"]
            output = self.model(**encoded)
            usage = {"tokens": int(mask.sum())}
            if self.task == "feature-extraction":
                weights = mask.unsqueeze(-1).float()
                mean = (output.last_hidden_state * weights).sum(1) / weights.sum(1)
                return {"embeddings": torch.nn.functional.normalize(mean).tolist(), "usage": usage}
            if self.task == "text-classification":
                names = self.model.config.id2label
                rows = [
                    [{"label": names[index], "score": score} for index, score in enumerate(row)]
                    for row in output.logits.softmax(-1).tolist()
                ]
                return {"predictions": rows, "usage": usage}
            predictions = []
            for ids, logits in zip(encoded["input_ids"], output.logits, strict=True):
                best = logits[ids == self.tokenizer.mask_token_id].softmax(-1).topk(top_k)
                predictions.append(
                    [
                        [
                            {"token": self.tokenizer.decode([token]), "token_id": token, "score": score}
                            for token, score in zip(tokens, scores, strict=True)
                        ]
                        for tokens, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                    ]
                )
            return {"predictions": predictions, "usage": usage}


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description="Flask and transformers in fp32, to compare with.")
    parser.add_argument("model", metavar="MODEL", help="model folder")
    parser.add_argument("--task", choices=sorted(AUTO_MODELS), default="feature-extraction")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plain = Plain(arguments.model, arguments.task, arguments.max_tokens)
    app = flask.Flask(__name__)

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/api/embed")
    @app.post("/api/classify")
    @app.post("/api/fill-mask")
    def answer() -> Any:
        body = flask.request.get_json()
        texts = [body["inputs"]] if isinstance(body["inputs"], str) else body["inputs"]
        if plain.task == "fill-mask" and not all(plain.tokenizer.mask_token in text for text in texts):
            return {"error": {"type": "invalid", "message": f"no {plain.tokenizer.mask_token} in a text"}}, 422
        return plain.run(texts, body.get("top_k", 5))

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_server("127.0.0.1", arguments.port, app, threaded=True)
    print(f"serving {arguments.model} on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
