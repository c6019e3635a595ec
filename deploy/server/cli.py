"""The options of `python -m deploy serve`. Standard library only; `serving` does what they say."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from ..bundle import TASKS
from ..options import model_name, origin, url_prefix
from ..options import positive as _positive
from ..options import seconds as _seconds
from .limits.bounds import Settings
from .process import PORT_VARIABLE
from .tei_options import add_tei_options, settle_tei_options
from .variants import add_options
from .wanted import named_model

__all__ = ["parse"]

API_KEY_VARIABLE = "DEPLOY_API_KEY"
WORKERS_VARIABLE = "WORKERS"


def _workers(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _parser(command: str = "serve") -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog=f"python -m deploy {command}",
        usage="%(prog)s MODEL [OPTION ...]    (--help lists the options)",
        description="Serve a bundle, or a model as it is, over HTTP. GET /docs on the running server describes its "
        "API.",
        epilog="Exit codes: 0 stopped by a signal, every accepted request answered; 1 some were not, or a bug; "
        "2 the model, the options or the address are wrong.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=model_name,
        metavar="MODEL",
        help="folder written by python -m deploy export; or a model's folder of Hugging Face or sentence-transformers, "
        "or an id on the hub, which is served as it is, in bf16, or in fp32 with --variant torch_ext-fp32",
    )
    parser.add_argument(
        "--model",
        dest="models",
        type=named_model,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="one more model, by the name that clients call it; may be given several times. Each gets an equal share "
        "of --threads, and the options of bundles and limits hold for each. A request that names no model is for the "
        "first",
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
        "--unix-socket",
        metavar="PATH",
        help="listen on this socket of the file system in place of --host and --port; who may write to it may connect",
    )
    parser.add_argument(
        "--tls-cert",
        metavar="FILE",
        help="speak TLS (1.2 and 1.3) with this certificate, in PEM, with those that signed it; SIGHUP reads it again",
    )
    parser.add_argument(
        "--tls-key", metavar="FILE", help="key of the certificate, in PEM, without a passphrase (default: --tls-cert)"
    )
    parser.add_argument(
        "--admin-address",
        metavar="HOST:PORT",
        help="where operators ask: POST /admin/reload loads the models again, as SIGHUP does, and answers whether they "
        "are served. Whoever reaches it may do so: 127.0.0.1:8001, say (default: none)",
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
        "the CPUs. Limits of tokens and memory are shared out among them "
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
    limits.add_argument(
        "--cache-mb",
        type=_positive,
        metavar="MB",
        help="memory for results of texts: the same text is computed once, and answered from there while it fits, the "
        "one that was asked for longest ago goes first (default: nothing is kept)",
    )
    times = parser.add_argument_group("times")
    times.add_argument(
        "--request-timeout",
        dest="request_timeout_s",
        type=_seconds,
        default=defaults.request_timeout_s,
        metavar="S",
        help="a request has to arrive within this time (default: %(default)s)",
    )
    times.add_argument(
        "--response-timeout",
        dest="response_timeout_s",
        type=_seconds,
        default=defaults.response_timeout_s,
        metavar="S",
        help="a client that reads less than 32 KB of its answers in this time, and not all, is disconnected, and so is "
        "one that was answered with an error and asks nothing for as long (default: %(default)s)",
    )
    times.add_argument(
        "--keep-alive",
        dest="keep_alive_s",
        type=_seconds,
        default=defaults.keep_alive_s,
        metavar="S",
        help="idle connections are closed after this time; longer than your load balancer's (default: %(default)s)",
    )
    times.add_argument(
        "--drain-delay",
        dest="drain_delay_s",
        type=_seconds,
        default=defaults.drain_delay_s,
        metavar="S",
        help="after SIGTERM, go on accepting for this time while /ready answers 503 (default: %(default)s)",
    )
    times.add_argument(
        "--drain-timeout",
        dest="drain_timeout_s",
        type=_seconds,
        default=defaults.drain_timeout_s,
        metavar="S",
        help="then answer what was accepted within this time (default: %(default)s)",
    )
    times.add_argument(
        "--measure-limit",
        dest="measure_limit_s",
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
        "--api-keys-file",
        metavar="FILE",
        help="require one of the keys of this file, which has their hashes and what each may use in a minute; python "
        "-m deploy key adds one. Beside it, the key of --api-key is taken, too, without limits",
    )
    parser.add_argument(
        "--cors-allow-origin",
        type=origin,
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


def parse(argv: Sequence[str], command: str = "serve") -> argparse.Namespace:
    """Reads the options; see the parser's help. Messages name the command."""
    parser = _parser(command)
    return settle_tei_options(parser, argv, parser.parse_args(argv), os.environ)
