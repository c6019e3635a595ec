"""Infinity with its torch engine in fp32; it makes batches by itself."""

from __future__ import annotations

from common import BATCH, announce_when_ready, arguments

options = arguments()

import torch  # noqa: E402
import uvicorn  # noqa: E402
from infinity_emb import EngineArgs, create_server  # noqa: E402

torch.set_num_threads(options.threads)
app = create_server(
    engine_args_list=[
        EngineArgs(
            model_name_or_path=options.model,
            served_model_name="model",
            engine="torch",
            device="cpu",
            dtype="float32",
            batch_size=BATCH,
            bettertransformer=False,
            model_warmup=False,
        )
    ]
)
announce_when_ready("Infinity", options.port)
uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)
