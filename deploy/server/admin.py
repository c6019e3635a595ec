"""The operator's address (`--admin-address`), apart from that of clients: `POST /admin/reload`.

Standard library only, since the supervisor of several workers has nothing else, and in a thread of its own, so that it
answers whatever the event loop does. It is imported only where there is such an address.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Admin", "NotNowError"]

READ_S = 10.0
"""How long a request may take to arrive."""


class NotNowError(Exception):
    """Nothing can be loaded now: the server starts, or stops."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, sock: socket.socket, reload: Callable[[], Future[str]]) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.reload = reload

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is nobody's error."""


class _Handler(BaseHTTPRequestHandler):
    timeout = READ_S
    server: _Server
    server_version = "torch-ext"
    sys_version = ""

    def do_POST(self) -> None:
        if self.path != "/admin/reload":
            self._tell(404, "not_found", f"no such path: {self.path[:200]}; POST to /admin/reload")
        elif "Origin" in self.headers:  # A page in the operator's browser, which can reach this address, too.
            self._tell(403, "forbidden", "expected no header Origin: this is not for pages")
        else:
            self._reload()

    def do_GET(self) -> None:
        if self.path == "/admin/reload":
            self._tell(405, "method_not_allowed", "/admin/reload: expected POST, got GET")
        else:
            self._tell(404, "not_found", f"no such path: {self.path[:200]}; POST to /admin/reload")

    def _reload(self) -> None:
        try:
            serving = self.server.reload().result()
        except NotNowError as error:
            self._tell(503, "not_now", str(error))
        except CancelledError:
            self._tell(503, "not_now", "the server is shutting down")
        except Exception as error:
            self._tell(422, "not_reloaded", f"{error}; what was served before is served on")
        else:
            self._answer(200, {"status": "reloaded", "serving": serving})

    def _tell(self, status: int, kind: str, message: str) -> None:
        self._answer(status, {"error": {"type": kind, "message": " ".join(message.split())}})

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class calls it so
        """Says nothing: what was loaded, or was not, is told where it happens."""


class Admin:
    """Answers operators until `close`."""

    def __init__(self, sock: socket.socket, reload: Callable[[], Future[str]]) -> None:
        """Starts the thread.

        Args:
            sock: Listens already.
            reload: Lets everything be loaded again; on a thread of this class. Its result says what is served then; its
                exception why what was before is served on.
        """
        sock.setblocking(True)
        self._server = _Server(sock, reload)
        self._thread = threading.Thread(target=self._server.serve_forever, name="admin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listens no more; answers that are under way are not waited for."""
        self._server.shutdown()
        self._server.server_close()
