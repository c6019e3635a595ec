"""TLS for the clients' address: certificate and key, which can be read again while connections are open.

Imported only where `--tls-cert` is given.
"""

from __future__ import annotations

import ssl

__all__ = ["Tls", "TlsError"]


class TlsError(ValueError):
    """Certificate or key cannot be used; the message names the option, and says what was expected."""


class _EncryptedError(Exception):
    """The key needs a passphrase."""


def _no_passphrase() -> str:
    raise _EncryptedError


class Tls:
    """What new connections are shown.

    Attributes:
        context: Of the listening socket; each handshake goes on with the certificate that was read last.
    """

    def __init__(self, certificate: str, key: str | None) -> None:
        """Reads both.

        Args:
            certificate: File of the certificate and those that signed it, in PEM.
            key: File of its key; None: it is in the same file.

        Raises:
            TlsError: They cannot be read, or do not belong together.
        """
        self._current = self.context = self.read(certificate, key)
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        if self._current is not context:
            connection.context = self._current

    def use(self, context: ssl.SSLContext) -> None:
        """Shows what `read` has read to connections from now on."""
        self._current = context

    @staticmethod
    def read(certificate: str, key: str | None) -> ssl.SSLContext:
        """Reads and checks; see `__init__`.

        Raises:
            TlsError: See `__init__`.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
            try:
                if path is not None:
                    with open(path, "rb"):
                        pass
            except OSError as error:
                raise TlsError(f"{option}: {path} cannot be read: {error.strerror}") from error
        try:
            context.load_cert_chain(certificate, key, password=_no_passphrase)
        except _EncryptedError as error:
            raise TlsError(
                f"--tls-key: expected a key without a passphrase, {key or certificate} has one; write it without, by "
                "openssl pkey -in KEY -out NEW"
            ) from error
        except ssl.SSLError as error:
            raise TlsError(_reason(error, certificate, key)) from error
        return context


def _reason(error: ssl.SSLError, certificate: str, key: str | None) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return (
            f"--tls-key: expected the key of the first certificate in {certificate}, got another one in "
            f"{key or 'the same file'}"
        )
    files = certificate if key is None else f"{certificate} and {key}"
    return (
        f"--tls-cert, --tls-key: expected a certificate and its key in PEM, got something else in {files} "
        f"({error.reason or error})"
    )
