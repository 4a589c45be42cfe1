"""Whom the device believes to be its broker and its enrolment server: the CA file it was made with, and what it learned.

A server that is believed may vouch for further CAs (EST `cacerts`); so the fleet follows when the service CA is rolled,
before the old one ends. What was learned is replaced as a whole, is kept durably, and never takes the first file's place.
Certificates of devices cannot pass for a server's, whoever has signed them: TLS asks for the usage `serverAuth`.
"""

import contextlib
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from agent.errors import CredentialError
from agent.storage import Storage, replace_durably

NAME = "trusted.pem"


class Trust:
    """The CAs of one device. `storage` None: it learns none."""

    def __init__(self, ca: Path | None, storage: Storage | None = None) -> None:
        self._ca = ca
        self._storage = storage

    def context(self) -> ssl.SSLContext:
        """TLS for a client, without a certificate of its own yet. Raises CredentialError."""
        try:
            context = ssl.create_default_context(cafile=str(self._ca) if self._ca else None)
        except OSError as error:
            raise CredentialError(f"cannot use {self._ca}: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        learned = self._storage.read(NAME) if self._storage is not None else None
        if learned:
            with contextlib.suppress(ssl.SSLError, UnicodeDecodeError):  # a torn file: the first CA still holds
                context.load_verify_locations(cadata=learned.decode("ascii"))
        return context

    def learn(self, certificates: Sequence[x509.Certificate]) -> bool:
        """Believe these, which a believed server has given, from now on. Whether that is news. Raises OSError."""
        found = sorted(one.public_bytes(Encoding.PEM) for one in certificates if _is_authority(one))
        if self._storage is None or not found or b"".join(found) == self._storage.read(NAME):
            return False
        replace_durably(self._storage, NAME, b"".join(found))
        return True


def _is_authority(certificate: x509.Certificate) -> bool:
    """Self-signed, and a CA by its own word."""
    try:
        certificate.verify_directly_issued_by(certificate)
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
