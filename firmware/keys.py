"""Ed25519 keys: making, keeping and naming them, and the set of keys that a device trusts.

Two roles that never share a key: the offline RELEASE key says what may ever run, the online ORDER key says which
device, which job, which attempt and until when. A device needs both, so neither key alone installs anything.

>>> key = generate_private_key()
>>> len(key_id(key.public_key()))
64
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import SSlibKey

from models.errors import ConflictError, InvalidInputError, NotFoundError

RELEASE = "release"
ORDER = "order"


def generate_private_key() -> Ed25519PrivateKey:
    """A new key from the system's random numbers."""
    return Ed25519PrivateKey.generate()


def key_id(public_key: Ed25519PublicKey) -> str:
    """Name of a key: hex sha256 of its 32 raw bytes."""
    return hashlib.sha256(public_key.public_bytes_raw()).hexdigest()


def trusted_key(public_key: Ed25519PublicKey) -> SSlibKey:
    """The key as securesystemslib verifies with it, named by `key_id`."""
    if not isinstance(public_key, Ed25519PublicKey):
        raise InvalidInputError(f"cannot trust a {type(public_key).__name__}: only Ed25519 keys sign firmware")
    return SSlibKey.from_crypto(public_key, keyid=key_id(public_key))


@dataclass(frozen=True, slots=True)
class TrustedKeys:
    """What a device trusts, by role. A role without keys trusts nothing: every envelope of it is refused."""

    release: tuple[SSlibKey, ...]
    order: tuple[SSlibKey, ...]

    @classmethod
    def of(cls, release: Iterable[Ed25519PublicKey], order: Iterable[Ed25519PublicKey]) -> "TrustedKeys":
        """The set for these public keys. Raises InvalidInputError for a key in both roles."""
        by_role = [{key.keyid: key for key in map(trusted_key, role)} for role in (release, order)]
        both = by_role[0].keys() & by_role[1].keys()
        if both:
            raise InvalidInputError(
                f"cannot trust key {min(both)[:16]} as release key and as order key: with one key for both, the online "
                "key alone could install anything; make a second key"
            )
        return cls(tuple(by_role[0].values()), tuple(by_role[1].values()))


def save_private_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a private key as PKCS#8 PEM, readable by its owner alone. Raises ConflictError where a file exists."""
    _write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600, "private key")


def save_public_key(path: Path, key: Ed25519PublicKey) -> None:
    """Write a public key as PEM. Raises ConflictError where a file exists."""
    _write_new(path, key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644, "public key")


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key. Raises NotFoundError, or InvalidInputError for what is not an unencrypted Ed25519 PEM."""
    data = _read(path, "private key")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"cannot read the private key {path}: expected an unencrypted PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInputError(f"cannot use the private key {path}: expected Ed25519, found {type(key).__name__}")
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key. Raises NotFoundError, or InvalidInputError for what is not an Ed25519 PEM."""
    data = _read(path, "public key")
    try:
        key = load_pem_public_key(data)
    except ValueError as error:
        raise InvalidInputError(f"cannot read the public key {path}: expected a public PEM: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInputError(f"cannot use the public key {path}: expected Ed25519, found {type(key).__name__}")
    return key


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read the {what} {path}: there is no such file; make one with keygen") from error
    except OSError as error:
        raise InvalidInputError(f"cannot read the {what} {path}: {error.strerror}") from error


def _write_new(path: Path, data: bytes, mode: int, what: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise ConflictError(
            f"cannot write the {what} {path}: the file exists, and what it signed would lose its key; "
            "choose another name or move it away"
        ) from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
