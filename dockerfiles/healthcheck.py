"""Health check of the server's image: exit code 0 if ``GET /ready`` answers 200, else 1 with a line that says why.

The port is that of the environment's PORT, which the server reads, too.

A bare socket, since importing an HTTP client takes seconds where the image's architecture is emulated.
"""

import os
import socket
import sys

TIMEOUT_S = 25


def check(port: int) -> str | None:
    """Ask the server on this port of 127.0.0.1.

    Returns:
        None if it is ready, else what is wrong.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            status = connection.makefile("rb").readline().decode("latin-1").strip()
    except OSError as error:
        return f"no answer on port {port}: {error}"
    return (
        None
        if status.startswith(("HTTP/1.0 200 ", "HTTP/1.1 200 "))
        else f"port {port} answers {status!r}, expected 200"
    )


def main() -> str | None:
    """Asks the server on the port that PORT names; returns what `check` returns."""
    port = os.environ.get("PORT") or "8000"
    if not (port.isascii() and port.isdecimal() and 0 < int(port) <= 65535):
        return f"PORT: expected 1 to 65535, got {port!r}"
    return check(int(port))


if __name__ == "__main__":
    sys.exit(main())
