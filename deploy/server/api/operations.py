"""Routes for whoever runs the server: state, metrics, and what it serves and how."""

from __future__ import annotations

from typing import Any

from .pages import API_PAGE, TRY_PAGE
from .route import ApiError, Caller, Context, Response, Route, encode
from .schemas import InfoResponse, ModelResponse, StatusResponse
from .tei import TEI

__all__ = ["ROUTES"]

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


async def info(context: Context, request: None, caller: Caller) -> Response:
    """GET /info."""
    service = context.service
    served, manifest, settings = service.served, service.manifest, service.settings
    if served is None:
        raise ApiError("loading", "the model is being loaded")
    choice = served.choice
    labels = manifest.labels or ()
    model_type: dict[str, Any] = {manifest.task: {}}
    if manifest.pooling is not None:
        model_type = {"embedding": {"pooling": manifest.pooling.mode}}
    elif manifest.sparse is not None:
        model_type = {"embedding": {"pooling": "splade"}}
    elif labels:
        names = {str(index): label for index, label in enumerate(labels)}
        kind = "reranker" if len(labels) == 1 else "classifier"
        kind = kind if manifest.task == "text-classification" else manifest.task
        model_type = {kind: {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}}
    dtype = manifest.variants[choice.variant].dtype
    accuracies = {name: manifest.variants[name].accuracy for name in choice.texts_per_s or (choice.variant,)}
    body = {
        "model_id": manifest.model.name,
        "model_sha": manifest.model.revision,
        "model_dtype": _DTYPES.get(dtype, dtype),
        "served_model_name": service.model,
        "model_type": model_type,
        "max_concurrent_requests": settings.max_concurrent_requests or settings.max_queue_tokens,
        "max_input_length": manifest.max_tokens,
        "max_batch_tokens": settings.max_batch_tokens,
        "max_batch_requests": settings.max_batch_requests,
        "max_client_batch_size": settings.max_inputs,
        "auto_truncate": settings.auto_truncate,
        "tokenization_workers": service.helper_threads,
        "version": served.versions["torch_ext"],
        "task": manifest.task,
        "variant": choice.variant,
        "isa": served.isa,
        "workers": settings.workers,
        "threads": settings.threads,
        "limits": {
            "max_tokens": manifest.max_tokens,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_queue_tokens": settings.max_queue_tokens,
            "max_inputs": settings.max_inputs,
            "max_chars": settings.max_chars,
            "max_body_bytes": settings.max_body_bytes,
            "max_values": settings.max_values,
            "max_memory_mb": service.budget.limit_mb,
        },
        "versions": served.versions,
        "chosen_by": choice.by,
        "candidates": [
            {
                "variant": name,
                "texts_per_s": choice.texts_per_s.get(name),
                "mean": None if accuracy is None else accuracy.mean,
                "min": None if accuracy is None else accuracy.min,
            }
            for name, accuracy in accuracies.items()
        ],
        "left_out": dict(choice.left_out),
        "models": [each.model for each in context.services],
    }
    return Response(encode(body))


async def live(context: Context, request: None, caller: Caller) -> Response:
    """GET /live."""
    return Response(b'{"status":"ok"}')


async def health(context: Context, request: None, caller: Caller) -> Response:
    """GET /health and /ping."""
    for service in context.services:
        service.check_running()
    return Response(b'{"status":"ok"}')


async def ready(context: Context, request: None, caller: Caller) -> Response:
    """GET /ready."""
    for service in context.services:
        service.check_ready()
    return Response(b'{"status":"ready"}')


async def metrics(context: Context, request: None, caller: Caller) -> Response:
    """GET /metrics."""
    return Response(context.metrics.answer(), ((b"content-type", context.metrics.CONTENT_TYPE.encode()),))


async def model(context: Context, request: None, caller: Caller) -> Response:
    """GET /api/model."""
    service = context.service
    manifest, served, mask = service.manifest, service.served, service.manifest.special_tokens["mask"]
    body = {
        "model": service.model,
        "task": manifest.task,
        "variant": None if served is None else served.choice.variant,
        "labels": len(manifest.labels or ()),
        "mask": None if mask is None else mask.token,
        "secured": service.settings.api_key is not None or service.settings.api_keys_file is not None,
    }
    return Response(encode(body))


async def first_page(context: Context, request: None, caller: Caller) -> Response:
    """GET /."""
    return TRY_PAGE


async def docs(context: Context, request: None, caller: Caller) -> Response:
    """GET /docs."""
    return API_PAGE


async def openapi(context: Context, request: None, caller: Caller) -> Response:
    """GET /openapi.json."""
    return Response(context.document())


ROUTES = (
    Route(
        method="GET",
        path="/info",
        summary="What is served, how, and why",
        handler=info,
        dialect=TEI,
        answer=InfoResponse,
        errors=("loading",),
        secured=True,
    ),
    Route(
        method="GET",
        path="/live",
        summary="Whether the process lives",
        handler=live,
        answer=StatusResponse,
        answered="It does.",
    ),
    *(
        Route(
            method="GET",
            path=path,
            summary=f"Whether the model is loaded and runs, as {of}",
            handler=health,
            dialect=TEI,
            answer=StatusResponse,
            answered="It does.",
            errors=("loading", "draining"),
        )
        for path, of in (("/health", "text-embeddings-inference has it"), ("/ping", "SageMaker asks"))
    ),
    Route(
        method="GET",
        path="/ready",
        summary="Whether requests are welcome",
        handler=ready,
        answer=StatusResponse,
        answered="They are.",
        errors=("loading", "draining"),
    ),
    Route(
        method="GET",
        path="/metrics",
        summary="Metrics for Prometheus",
        handler=metrics,
        answered="Prometheus' text format, version 0.0.4.",
        media_type="text/plain",
    ),
    Route(
        method="GET",
        path="/api/model",
        summary="What the page offers to try",
        handler=model,
        answer=ModelResponse,
    ),
    Route(
        method="GET",
        path="/",
        summary="A page to try the model, with plots of the load",
        handler=first_page,
        answered="HTML.",
        media_type="text/html",
    ),
    Route(
        method="GET",
        path="/docs",
        summary="This description as a page",
        handler=docs,
        answered="HTML.",
        media_type="text/html",
    ),
    Route(
        method="GET",
        path="/openapi.json",
        summary="This description",
        handler=openapi,
        answered="OpenAPI 3.1.",
    ),
)
