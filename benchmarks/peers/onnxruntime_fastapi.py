"""FastAPI and ONNX Runtime, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import arguments

options = arguments()

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from fastapi_app import serve  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

folder = Path(options.model)
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(256)
tokenizer.enable_padding()
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = options.threads
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"])
names = {value.name for value in session.get_inputs()}


def vectors(texts: list[str]) -> Any:
    """Unit vectors of the mean of the tokens."""
    encodings = tokenizer.encode_batch(texts)
    ids = np.array([encoding.ids for encoding in encodings], np.int64)
    mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    hidden = session.run(None, {name: given[name] for name in names})[0]
    mean = (hidden * mask[..., None]).sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


serve("FastAPI and ONNX Runtime", options.port, vectors)
