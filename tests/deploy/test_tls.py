"""TLS and sockets of the file system, in one process and with workers."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.server.lifecycle import Server
from deploy.server.process import UsageError, open_listener
from deploy.server.sockets import listen, listen_unix, url_of
from deploy.server.tls import Tls, TlsError
from tests.deploy.server_harness import wait_until
from tests.deploy.test_reload import ask, free_port
from tests.deploy.test_workers import ROOT, BundleMaker

# For these tests alone: self-signed, valid until 2126.
CERTIFICATES = {
    "one": """\
-----BEGIN CERTIFICATE-----
MIIBjjCCATWgAwIBAgIUHQQ2TZH4pC3vW6arYmVulBby85IwCgYIKoZIzj0EAwIw
DjEMMAoGA1UEAwwDb25lMCAXDTI2MTEyNzE2MzMxMloYDzIxMjYxMTAzMTYzMzEy
WjAOMQwwCgYDVQQDDANvbmUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATUZIj3
vVvrz58F827dQeJNEY5lodiPv/tWqfUrD53WeiXZSvu6o+hJd9DMonhYARLLErLa
NjZHgGSy9UAHCXsUo28wbTAdBgNVHQ4EFgQUfj/V8ROh3kUF48JDuYttlTbkG0Mw
HwYDVR0jBBgwFoAUfj/V8ROh3kUF48JDuYttlTbkG0MwDwYDVR0TAQH/BAUwAwEB
/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZIzj0EAwIDRwAwRAIg
HZk7P23RrhpY0JKUaroBBCycLr/WUCjhqosQHZiw5R8CIDKMlqQkzQcqpnRfw/U3
OV51w1O9c6dGZoRy5tv1EDSn
-----END CERTIFICATE-----
""",
    "two": """\
-----BEGIN CERTIFICATE-----
MIIBjzCCATWgAwIBAgIUasDFgINei922TG0NAGJsHiYwiaMwCgYIKoZIzj0EAwIw
DjEMMAoGA1UEAwwDdHdvMCAXDTI2MTEyNzE2MzMxMloYDzIxMjYxMTAzMTYzMzEy
WjAOMQwwCgYDVQQDDAN0d28wWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASNxe0Z
C2P2GIgCZLNzSpj8ZvqFwwm8q7jFunOThhNHc/hpGtgglr+aZr+5YJpUo50s01AG
2oGVbnkk+BiN9rKMo28wbTAdBgNVHQ4EFgQUrClS82OACxW5rH5yAUpfv3dJbJYw
HwYDVR0jBBgwFoAUrClS82OACxW5rH5yAUpfv3dJbJYwDwYDVR0TAQH/BAUwAwEB
/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZIzj0EAwIDSAAwRQIh
AMc86xbMT3AzdjWzTIkyfDt5zmbNcPzZi/qOAW68mDnrAiBbGYFLn/zReYJ0tBNb
FEPROX02dFxP/0DhD6kp25FzYA==
-----END CERTIFICATE-----
""",
}
KEYS = {
    "one": """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg41Fl/s6NbQKNPSMJ
mjtXjvxS77Tp3H615UaND84MV5ehRANCAATUZIj3vVvrz58F827dQeJNEY5lodiP
v/tWqfUrD53WeiXZSvu6o+hJd9DMonhYARLLErLaNjZHgGSy9UAHCXsU
-----END PRIVATE KEY-----
""",
    "two": """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgD4kpr2N81lJ8Olcx
sEKptX0+dYlnZ5P7ENkAqk/VdtqhRANCAASNxe0ZC2P2GIgCZLNzSpj8ZvqFwwm8
q7jFunOThhNHc/hpGtgglr+aZr+5YJpUo50s01AG2oGVbnkk+BiN9rKM
-----END PRIVATE KEY-----
""",
}
ENCRYPTED = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAh8BCdwZ6+YYwICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEEPTxmA7knMdYPx1rwKat8UEgZDz
sKN/jklyHuozl3q9hCX05OPKf5A39458iel+LGKcPTYvI7oP8LxDHqPC7GAhp0OQ
/4savEtfCLLilyFNiMvWII09pH6vU1lCK9iyrcsdaXloh5HZOn1uSZMF2VX0vm3T
NyCkmHw3jLhWvkebfxsL3NXbnd8BBRQHewPdVVozCncLSY0PNwhTenWnghHU8w0=
-----END ENCRYPTED PRIVATE KEY-----
"""


def write(folder: Path, name: str, key: str | None = None) -> tuple[str, str]:
    """Writes a certificate and a key; the paths are the same for all."""
    (folder / "cert.pem").write_text(CERTIFICATES[name])
    (folder / "key.pem").write_text(KEYS[key or name])
    return str(folder / "cert.pem"), str(folder / "key.pem")


def trusting(name: str) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=CERTIFICATES[name])


@contextlib.contextmanager
def serving(bundle: Path, *options: object, count: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and where it says that it is."""
    fixed = ["--port", "0", "--variant", "torch_ext-bf16", "--threads", "1"]
    more = [] if count is None else ["--workers", str(count)]
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", "serve", str(bundle), *fixed, *map(str, options), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, line.partition(" on ")[2].split()[0]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=40)
        assert process.returncode == 0, err
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


BODY = json.dumps({"inputs": "a text"})


def embed(connection: http.client.HTTPConnection, times: int = 1, keep: bool = False) -> int:
    try:
        for _ in range(times):
            connection.request("POST", "/embed", BODY)
            answer = connection.getresponse()
            assert len(json.loads(answer.read())[0]) == 64
        return answer.status
    finally:
        if not keep:
            connection.close()


@pytest.mark.parametrize("count", [None, 2])
def test_tls_and_another_certificate(tiny_bundle: BundleMaker, tmp_path: Path, count: int | None) -> None:
    certificate, key = write(tmp_path, "one")
    admin = free_port()
    options = ("--tls-cert", certificate, "--tls-key", key, "--admin-address", f"127.0.0.1:{admin}")
    with serving(tiny_bundle("bert", "feature-extraction"), *options, count=count) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        port = int(url.rpartition(":")[2])

        def connect(name: str) -> http.client.HTTPSConnection:
            return http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=trusting(name))

        kept = connect("one")
        assert embed(kept, 3, keep=True) == 200
        assert kept.sock.version() in ("TLSv1.2", "TLSv1.3")
        with pytest.raises(ssl.SSLCertVerificationError):
            embed(connect("two"))
        old = trusting("one")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That nobody should.
            old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, OSError)):
            embed(http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=old))
        with pytest.raises((http.client.HTTPException, OSError)):
            embed(http.client.HTTPConnection("127.0.0.1", port, timeout=30))
        # A wrong pair changes nothing.
        write(tmp_path, "two", key="one")
        told = ask(admin)
        assert told.status == 422
        assert "--tls-key: expected the key of the first certificate" in told.json["error"]["message"]
        assert embed(connect("one")) == 200
        write(tmp_path, "two")
        assert ask(admin).status == 200
        assert embed(connect("two")) == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            embed(connect("one"))
        if count is None:
            assert embed(kept, keep=True) == 200  # It has its session.
        kept.close()


def test_a_large_answer_and_a_client_that_leaves_over_tls(tiny_bundle: BundleMaker, tmp_path: Path) -> None:
    (tmp_path / "both.pem").write_text(CERTIFICATES["one"] + KEYS["one"])
    with serving(tiny_bundle("bert", "feature-extraction"), "--tls-cert", tmp_path / "both.pem") as (_, url):
        port = int(url.rpartition(":")[2])
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=trusting("one"))
        connection.request("POST", "/embed", json.dumps({"inputs": ["a"] * 3000}))
        assert len(json.loads(connection.getresponse().read())) == 3000
        leaving = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=trusting("one"))
        leaving.request("POST", "/embed", json.dumps({"inputs": ["a text of a few words"] * 3000}))
        leaving.close()
        assert embed(connection) == 200


@pytest.mark.parametrize("count", [None, 2])
def test_clients_that_say_nothing_do_not_hold_up_the_end(
    tiny_bundle: BundleMaker, tmp_path: Path, count: int | None
) -> None:
    """One keeps a connection, as pools do, and confirms no end of TLS; another one never shakes hands."""
    certificate, key = write(tmp_path, "one")
    options = ("--tls-cert", certificate, "--tls-key", key)
    with serving(tiny_bundle("bert", "feature-extraction"), *options, count=count) as (process, url):
        port = int(url.rpartition(":")[2])
        kept = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=trusting("one"))
        with socket.create_connection(("127.0.0.1", port)):
            assert embed(kept, 2, keep=True) == 200
            process.send_signal(signal.SIGTERM)
            begun_s = time.monotonic()
            assert process.wait(40) == 0
            assert time.monotonic() - begun_s < 12  # Of a drain timeout of 25 s.
        kept.close()


@pytest.mark.parametrize("kind", ["silent", "closed", "other"])
def test_what_is_accepted_last_and_speaks_no_tls_harms_nobody(tmp_path: Path, kind: str) -> None:
    class Ending(Server):
        def __init__(self, context: ssl.SSLContext) -> None:
            self.servers = []
            self.config = SimpleNamespace(ssl=context)  # type: ignore[assignment]
            self._entering = set()

        def _protocol(self) -> Any:
            return asyncio.Protocol()

    async def end() -> None:
        server = Ending(Tls(*write(tmp_path, "one")).context)
        await asyncio.wait_for(server._stop_listening([listener]), 10)
        for task in list(server._entering):
            task.cancel()
        while server._entering:
            await asyncio.sleep(0.01)

    listener = listen("127.0.0.1", 0)
    with socket.create_connection(listener.getsockname()) as client:
        if kind == "closed":
            client.close()
        elif kind == "other":
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        asyncio.run(end())


def test_a_certificate_that_cannot_be_used_is_told_of(tmp_path: Path) -> None:
    certificate, key = write(tmp_path, "one", key="two")
    with pytest.raises(TlsError, match=r"--tls-key: expected the key of the first certificate in .*, got another one"):
        Tls(certificate, key)
    with pytest.raises(TlsError, match=r"--tls-cert: .*nothing cannot be read: No such file"):
        Tls(str(tmp_path / "nothing"), key)
    with pytest.raises(TlsError, match=r"--tls-key: .*nothing cannot be read: No such file"):
        Tls(certificate, str(tmp_path / "nothing"))
    (tmp_path / "key.pem").write_text(ENCRYPTED)
    with pytest.raises(TlsError, match="expected a key without a passphrase"):
        Tls(certificate, key)
    (tmp_path / "key.pem").write_text("nonsense")
    with pytest.raises(TlsError, match="expected a certificate and its key in PEM, got something else"):
        Tls(certificate, key)
    with pytest.raises(TlsError, match="expected a certificate and its key in PEM"):
        Tls(certificate, None)


def test_a_key_without_a_certificate(tiny_bundle: BundleMaker, tmp_path: Path) -> None:
    _, key = write(tmp_path, "one")
    command = [
        sys.executable,
        "-m",
        "deploy",
        "serve",
        str(tiny_bundle("bert", "feature-extraction")),
        "--tls-key",
        key,
    ]
    for more in ([], ["--workers", "1", "--port", "0"]):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "--tls-key: expected --tls-cert beside it, got none" in done.stderr


# ---- sockets of the file system --------------------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self.path))


@pytest.mark.parametrize("count", [None, 2])
def test_a_socket_of_the_file_system(tiny_bundle: BundleMaker, tmp_path: Path, count: int | None) -> None:
    path = tmp_path / "socket"
    left = listen_unix(str(path))
    left.close()  # A server that was killed leaves it behind.
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    with serving(tiny_bundle("bert", "feature-extraction"), "--unix-socket", path, count=count) as (process, url):
        assert url == f"http+unix://{path}"
        connection = UnixConnection(path)
        assert embed(connection, 3, keep=True) == 200
        assert embed(UnixConnection(path)) == 200
        leaving = UnixConnection(path)
        leaving.request("POST", "/embed", BODY)
        leaving.sock.shutdown(socket.SHUT_WR)
        assert leaving.getresponse().status == 200
        leaving.close()
        connection.close()
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not path.exists(), 20)


@pytest.mark.parametrize(("kind", "count"), [("file", None), ("file", 2), ("tls", None), ("plain", 2)])
def test_who_reads_nothing_is_disconnected(
    tiny_bundle: BundleMaker, tmp_path: Path, kind: str, count: int | None
) -> None:
    path = tmp_path / "socket"
    options: list[object] = ["--response-timeout", "1"]
    options += ["--unix-socket", path] if kind == "file" else []
    certificate, key = write(tmp_path, "one")
    options += ["--tls-cert", certificate, "--tls-key", key] if kind == "tls" else []
    body = json.dumps({"inputs": ["a"] * 5000}).encode()
    with serving(tiny_bundle("bert", "feature-extraction"), *options, count=count) as (_, url):
        sock = socket.socket(socket.AF_UNIX if kind == "file" else socket.AF_INET)
        sock.settimeout(30)
        if kind == "file":
            sock.connect(str(path))
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        if kind == "tls":
            sock = trusting("one").wrap_socket(sock, server_hostname="localhost")
        with sock:
            sock.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            time.sleep(8)
            size = 0
            with contextlib.suppress(ConnectionResetError, ssl.SSLError):
                while part := sock.recv(1 << 16):
                    size += len(part)
            assert 0 < size < 5000 * 64 * 8  # Of twice as much.


def test_what_is_there_is_not_taken_away(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    first = open_listener("", 0, path)
    assert url_of(first) == f"http+unix://{path}"
    assert url_of(first, tls=True) == f"https+unix://{path}"
    with pytest.raises(UsageError, match=r"--unix-socket: cannot listen on .*socket: another server listens there"):
        open_listener("", 0, path)
    first.close()
    (tmp_path / "file").write_text("of somebody")
    with pytest.raises(UsageError, match="there is a file that is no socket"):
        open_listener("", 0, str(tmp_path / "file"))
    with pytest.raises(UsageError, match="No such file"):
        open_listener("", 0, str(tmp_path / "nowhere" / "socket"))
    assert (tmp_path / "file").read_text() == "of somebody"


def test_ssl_is_not_imported_by_the_modules_that_every_start_needs() -> None:
    modules = "deploy.server.serving, deploy.server.workers.supervisor"
    program = f"import sys, {modules}; print(*('ssl' in sys.modules, 'http.server' in sys.modules))"
    done: Any = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
