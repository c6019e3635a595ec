"""FastAPI and ONNX Runtime, fp32: a function of the thread pool for each request, no batches across requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import announce_when_ready, arguments

options = arguments()

import fastapi  # noqa: E402
import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import pydantic  # noqa: E402
import uvicorn  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

folder = Path(options.model)
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(256)
tokenizer.enable_padding()
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = options.threads
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"])
names = {value.name for value in session.get_inputs()}
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
    """Unit vectors of the mean of the tokens."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    encodings = tokenizer.encode_batch(texts)
    ids = np.array([encoding.ids for encoding in encodings], np.int64)
    mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    hidden = session.run(None, {name: given[name] for name in names})[0]
    mean = (hidden * mask[..., None]).sum(1)
    return {"embeddings": (mean / np.linalg.norm(mean, axis=1, keepdims=True)).tolist()}


announce_when_ready("FastAPI and ONNX Runtime", options.port)
uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)
