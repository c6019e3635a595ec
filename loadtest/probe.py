"""Questions to a server before a load test: is it there, is it ready, what is its model?"""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from typing import Any, Protocol
from urllib.parse import urlsplit

from loadtest.options import CannotStartError
from loadtest.tasks import InvalidResponseError, Task, Traits

__all__ = ["Settings", "check_host", "check_server", "learn_traits"]

MASK_TOKENS = ("[MASK]", "<mask>")
"""Those of the BERT and of the RoBERTa family, for a server that does not tell its own."""


class Settings(Protocol):
    """What a probe reads of a load test's options."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""

    @property
    def request_timeout_s(self) -> float:
        """How long an answer may take."""

    @property
    def model(self) -> str:
        """Name of the model, empty for the server's first."""

    @property
    def mask_token(self) -> str:
        """Stands for a gap, empty for the server's own."""

    @property
    def encoding_format(self) -> str:
        """``float`` or ``base64``."""

    @property
    def top_k(self) -> int:
        """Candidates at each gap."""


_REDIRECTS = (301, 302, 303, 307, 308)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The load follows no redirect either; urllib would send the key along, and make GET of POST."""

    def redirect_request(self, *_: Any) -> None:
        """Follows none."""


class _Probe:
    """Sends single requests. A proxy from the environment is not used, since the load does not use one either."""

    def __init__(
        self, host: str, headers: dict[str, str], timeout_s: float, trust: ssl.SSLContext | None = None
    ) -> None:
        self.host = host
        self.headers = headers
        self.timeout_s = timeout_s
        self.opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust), _NoRedirects
        )

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Sends POST with a body, GET without, and returns status and body of the answer.

        Raises:
            CannotStartError: No answer, or a redirect.
        """
        request = urllib.request.Request(self.host + path, data=body, headers=self.headers)
        try:
            with self.opener.open(request, timeout=self.timeout_s) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                if error.code in _REDIRECTS:
                    place = str(error.headers.get("Location", "nowhere"))[:200]
                    raise CannotStartError(
                        f"{self.host}{path} redirects to {place}, and the load follows no redirect: pass the address "
                        "behind it as --host"
                    ) from error
                return error.code, error.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or repr(error)
            advice = "Is the server running, and is --host right?"
            if isinstance(reason, ssl.SSLCertVerificationError):
                advice = (
                    "Does --host have the name in the certificate, and --ca (for Locust: SSL_CERT_FILE) its authority?"
                )
            elif isinstance(reason, ssl.SSLError):
                advice = "Does the server speak HTTPS?"
            raise CannotStartError(f"no answer from {self.host}{path}: {reason}. {advice}") from error

    def ask_json(self, path: str) -> dict[str, Any]:
        """Sends GET; an answer that is not a JSON object counts as an empty one."""
        status, content = self.ask(path)
        try:
            answer = json.loads(content) if status == 200 else {}
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}


def check_host(host: str | None) -> str:
    """Looks at an address.

    Returns:
        The host without a slash at its end.

    Raises:
        CannotStartError: There is none, or it is not a URL.
    """
    if not host:
        raise CannotStartError("no server to test: pass --host, for example --host http://127.0.0.1:8000")
    try:
        parts = urlsplit(host)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and host.isascii() and host.isprintable() and " " not in host
    except ValueError:
        valid = False
    if valid and (parts.username is not None or parts.query or parts.fragment):
        # The address is shown, and kept in results: it must hold no password.
        raise CannotStartError(
            "--host: expected no user, password, query or fragment in the address; --api-key sends a key"
        )
    if not valid:
        raise CannotStartError(f"--host: expected a URL such as http://127.0.0.1:8000, got {host!r}")
    return host.rstrip("/")


def check_server(host: str, options: Settings, trust: ssl.SSLContext | None = None) -> None:
    """Stops unless a server answers and is ready. One without ``/ready`` (it answers 404) is taken as ready.

    Args:
        host: Address of the server.
        options: Of the load test.
        trust: Which certificates are trusted; None for those of this system.

    Raises:
        CannotStartError: No answer, or a server that says it is not ready.
    """
    status, _ = _Probe(host, options.headers, min(5.0, options.request_timeout_s), trust).ask("/ready")
    if status == 503:
        raise CannotStartError(f"the server at {host} is not ready (GET /ready answers 503): wait until it is")


def _mask_tokens(task: Task, known: Any) -> tuple[str | None, ...]:
    """The mask tokens to try: a text without the model's own is refused with status 422."""
    if not task.needs_mask:
        return (None,)
    return (str(known),) if known else MASK_TOKENS


def learn_traits(host: str, options: Settings, task: Task, trust: ssl.SSLContext | None = None) -> Traits:
    """Asks the server what its model is, and tries the endpoint once.

    Args:
        host: Address of the server.
        options: Of the load test.
        task: The endpoint.
        trust: Which certificates are trusted; None for those of this system.

    Raises:
        CannotStartError: The endpoint is not there, or does not answer rightly.
    """
    probe = _Probe(host, options.headers, options.request_timeout_s, trust)
    traits = Traits(options.model, options.mask_token or None, None, options.encoding_format, options.top_k)
    models = probe.ask_json("/v1/models").get("data")
    first = models[0] if isinstance(models, list) and models and isinstance(models[0], dict) else {}
    traits.model = traits.model or str(first.get("id", ""))
    if "{model}" in task.path and not traits.model:
        raise CannotStartError(
            f"{task.path}: the server at {host} does not tell its model (GET /v1/models): pass --model"
        )
    path = task.path_at(traits)
    status, content = 0, b""
    for mask_token in _mask_tokens(task, traits.mask_token or first.get("mask_token")):
        traits.mask_token = mask_token
        text = f"a {mask_token} text" if task.needs_mask else "a text"
        status, content = probe.ask(path, task.body([text], traits))
        if status != 422:
            break
    if status in (404, 405):
        raise CannotStartError(f"the server at {host} has no {path} (status {status}): choose another --task")
    # A server that is full already is what a load test may well meet.
    if status != 429:
        if status != 200:
            start = content[:200].decode("utf-8", "replace")
            raise CannotStartError(f"the server at {host} does not answer POST {path}: status {status}, {start}")
        try:
            task.validate(content, 1, traits)
        except InvalidResponseError as error:
            raise CannotStartError(f"the server at {host} answers POST {path} wrongly: {error}") from error
    return traits
