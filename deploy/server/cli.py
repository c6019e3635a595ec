"""The options of `python -m deploy serve`, and how one process serves by them.

Only the standard library is imported before the threads are settled: OpenMP reads its variables once, when torch loads.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from ..bundle import TASKS, BundleError, check_config, load_manifest
from ..options import positive as _positive
from ..options import url_prefix
from .limits.bounds import Settings
from .model import describe
from .process import PORT_VARIABLE, Process, port_of, settle_threads, start_logging
from .tei_options import add_tei_options, fit_manifest, settle_tei_options
from .variants import add_options

if TYPE_CHECKING:
    from ..engines.engine import Engine

__all__ = ["parse", "serve"]

API_KEY_VARIABLE = "DEPLOY_API_KEY"
WORKERS_VARIABLE = "WORKERS"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds from 0, got {text}")
    return value


def _workers(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m deploy serve",
        description="Serve a bundle, or a model as it is, over HTTP. GET /docs on the running server describes its "
        "API.",
        epilog="Exit codes: 0 stopped by a signal, every accepted request answered; 1 some were not, or a bug; "
        "2 the model, the options or the address are wrong.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder written by python -m deploy export; or a model's folder of Hugging Face or sentence-transformers, "
        "or an id on the hub, which is served as it is, in bf16, or in fp32 with --variant torch_ext-fp32",
    )
    parser.add_argument(
        "--task", choices=TASKS, help="of a model that was not exported; default: from the model's files"
    )
    add_options(parser)
    parser.add_argument("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=int,
        help=f"0 takes a free one and prints it (default: {PORT_VARIABLE} of the environment, else {defaults.port})",
    )
    parser.add_argument(
        "--threads", type=_positive, help="threads of the engine (default: CPU quota of the container, rounded down)"
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=os.environ.get(WORKERS_VARIABLE) or None,
        metavar="N|auto",
        help="processes that serve together on one copy of the weights, each with its own CPUs and --threads; auto: by "
        "the CPUs. SIGHUP loads the bundle again. Limits of tokens and memory are shared out among them "
        f"(default: {WORKERS_VARIABLE} of the environment, else this process alone)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-batch-tokens",
        type=_positive,
        default=defaults.max_batch_tokens,
        help="token budget of a batch; in fill-mask, a mask counts as several tokens (default: %(default)s)",
    )
    limits.add_argument(
        "--max-queue-tokens",
        type=_positive,
        default=defaults.max_queue_tokens,
        help="tokens of that budget that may wait or run; more is answered with 429 (default: %(default)s)",
    )
    limits.add_argument(
        "--max-queue-ms",
        type=_positive,
        default=defaults.max_queue_ms,
        metavar="MS",
        help="how long a request may take from the queue to its answer; one that would take longer, by the measured "
        "speed, is answered with 429 at once; requests larger than a batch may take 5 times as long as they compute "
        "(default: %(default)s)",
    )
    limits.add_argument(
        "--max-batch-ms",
        type=_positive,
        default=defaults.max_batch_ms,
        metavar="MS",
        help="how long a batch may take, by the measured speed, within --max-batch-tokens: what others wait for "
        "(default: %(default)s)",
    )
    limits.add_argument(
        "--max-inputs",
        type=_positive,
        default=defaults.max_inputs,
        help="texts that GET /info tells clients to send in a request; one with more is split (default: %(default)s)",
    )
    limits.add_argument(
        "--max-chars",
        type=_positive,
        default=defaults.max_chars,
        help="characters of a text that are read at first; the rest is read only if these make fewer tokens than the "
        "model takes (default: %(default)s)",
    )
    limits.add_argument(
        "--max-body-bytes", type=_positive, default=defaults.max_body_bytes, help="request body (default: %(default)s)"
    )
    limits.add_argument(
        "--max-values",
        type=_positive,
        default=defaults.max_values,
        help="numbers in one answer: texts x width of embeddings, masks x top_k x 3 (default: %(default)s)",
    )
    limits.add_argument(
        "--max-memory-mb",
        type=_positive,
        default=defaults.max_memory_mb,
        metavar="MB",
        help="memory that all connections and requests may hold; more is answered with 429 (default: half of what is "
        "available once the model is loaded, within the limits of the control groups)",
    )
    times = parser.add_argument_group("times")
    times.add_argument(
        "--request-timeout",
        type=_seconds,
        default=defaults.request_timeout_s,
        metavar="S",
        help="a request has to arrive within this time (default: %(default)s)",
    )
    times.add_argument(
        "--response-timeout",
        type=_seconds,
        default=defaults.response_timeout_s,
        metavar="S",
        help="a client that reads nothing of its answer for this time is disconnected (default: %(default)s)",
    )
    times.add_argument(
        "--keep-alive",
        type=_seconds,
        default=defaults.keep_alive_s,
        metavar="S",
        help="idle connections are closed after this time; longer than your load balancer's (default: %(default)s)",
    )
    times.add_argument(
        "--drain-delay",
        type=_seconds,
        default=defaults.drain_delay_s,
        metavar="S",
        help="after SIGTERM, go on accepting for this time while /ready answers 503 (default: %(default)s)",
    )
    times.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=defaults.drain_timeout_s,
        metavar="S",
        help="then answer what was accepted within this time (default: %(default)s)",
    )
    times.add_argument(
        "--measure-limit",
        type=_seconds,
        default=defaults.measure_limit_s,
        metavar="S",
        help="without --variant, measure for this time at most; variants not measured by then are left out "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY_VARIABLE),
        help=f"require Authorization: Bearer KEY; better given in {API_KEY_VARIABLE}, which other users cannot see",
    )
    parser.add_argument(
        "--cors-allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose pages may ask, * for all; may be given several times (default: none)",
    )
    parser.add_argument("--root-path", type=url_prefix, default="", metavar="/PREFIX", help="what all paths begin with")
    parser.add_argument(
        "--accept-token-ids", action="store_true", help="take token ids of the model's tokenizer in place of texts"
    )
    parser.add_argument(
        "--any-dimensions",
        action="store_true",
        help="cut embeddings to any width that OpenAI's clients ask for, whatever the model was trained for",
    )
    parser.add_argument("--access-log", action="store_true", help="print a line per request (costs CPU)")
    add_tei_options(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the options; see the parser's help."""
    parser = _parser()
    return settle_tei_options(parser, argv, parser.parse_args(argv), os.environ)


def serve(arguments: argparse.Namespace, process: Process) -> int:
    """Serves in this process until a signal.

    Args:
        arguments: See `parse`.
        process: What is decided for this process.

    Returns:
        The exit code.

    Raises:
        BundleError: The bundle cannot be served.
        UsageError: An option is wrong, or the address cannot be used.
    """
    # Names and sizes now, hashes when it is known which variants may be loaded.
    manifest, exported = describe(arguments.model, arguments.task)
    process.check(manifest)
    manifest = fit_manifest(manifest, arguments)
    port = port_of(arguments.port, os.environ)
    threads = process.threads(arguments.threads)
    settle_threads(threads)
    start_logging(arguments.json_output)
    selection = process.selection(manifest, arguments, threads)
    # The hashes of large files take as long as the imports, and need another core for it; so does the engine, if it is
    # known.
    beside = ThreadPoolExecutor(2)
    check = partial(load_manifest, manifest.root, verify=True, variants=process.files_of(selection))
    checked = beside.submit(check) if exported else None
    tokenizers: Future[TextTokenizer] = Future()

    def open_engine(variant: str) -> tuple[Engine, str]:
        from ..engines.open import load_engine

        return load_engine(
            manifest,
            manifest.variant(variant),
            threads,
            lambda token: tokenizers.result().token(token),
            image=process.image,
        )

    known = selection.names[0] if len(selection.names) == 1 else None
    opened = beside.submit(open_engine, known) if known is not None else None
    beside.shutdown(wait=False)

    from .app import App
    from .service import Batcher, TextTokenizer

    try:
        if checked is not None:
            manifest = fit_manifest(checked.result(), arguments)
            check_config(manifest)
        tokenizer = TextTokenizer.from_manifest(manifest)
    except ValueError as error:
        tokenizers.cancel()  # Nobody may wait for it any more.
        raise error if isinstance(error, BundleError) else BundleError(str(error)) from error
    tokenizers.set_result(tokenizer)
    settings = Settings(
        host=arguments.host,
        port=port,
        threads=threads,
        max_batch_tokens=arguments.max_batch_tokens,
        max_queue_tokens=arguments.max_queue_tokens,
        max_queue_ms=arguments.max_queue_ms,
        max_batch_ms=arguments.max_batch_ms,
        max_body_bytes=arguments.max_body_bytes,
        max_inputs=arguments.max_inputs,
        max_chars=arguments.max_chars,
        max_values=arguments.max_values,
        max_memory_mb=arguments.max_memory_mb,
        request_timeout_s=arguments.request_timeout,
        response_timeout_s=arguments.response_timeout,
        keep_alive_s=arguments.keep_alive,
        drain_delay_s=arguments.drain_delay,
        drain_timeout_s=arguments.drain_timeout,
        measure_limit_s=arguments.measure_limit,
        api_key=arguments.api_key or None,
        access_log=arguments.access_log,
        accept_token_ids=arguments.accept_token_ids,
        any_dimensions=arguments.any_dimensions,
        cors_allow_origin=tuple(arguments.cors_allow_origin),
        root_path=arguments.root_path,
        auto_truncate=arguments.auto_truncate,
        served_model_name=arguments.served_model_name,
        max_concurrent_requests=arguments.max_concurrent_requests,
        max_batch_requests=arguments.max_batch_requests,
        tokenization_workers=arguments.tokenization_workers,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # Otherwise a line for everything that is not HTTP.
    if settings.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    settings = process.settings(settings)
    sockets = process.listen(settings)
    selection.prepare(tokenizer.vocab_size, settings.measure_limit_s)
    isa = ""

    def load() -> Engine:
        nonlocal isa
        choice = selection.decide()
        engine, isa = open_engine(choice.variant) if opened is None else opened.result()
        app.serves(choice, isa)
        return engine

    def announce() -> None:
        process.announce(manifest, selection.decide(), threads, isa)

    batcher = Batcher(
        load,
        settings.max_batch_tokens,
        settings.max_queue_tokens,
        max_queue_s=1e-3 * settings.max_queue_ms,
        max_batch_s=1e-3 * settings.max_batch_ms,
        max_batch_texts=settings.max_batch_requests,
    )
    batcher.cancel_load = selection.cancel
    app = App(manifest, tokenizer, batcher, settings)
    batcher.on_batch = app.count_batch
    server = process.server(app, batcher, settings, announce)
    server.run(sockets=sockets)
    for number in (signal.SIGTERM, signal.SIGINT):  # All is done but to say so by the exit code.
        signal.signal(number, signal.SIG_IGN)
    if server.load_error is not None:
        if isinstance(server.load_error, BundleError):
            raise server.load_error
        raise BundleError(
            f"{manifest.root}: {' or '.join(selection.names)} cannot be loaded: "
            f"{type(server.load_error).__name__}: {server.load_error}"
        ) from server.load_error
    return server.exit_code
