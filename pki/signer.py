"""Where the keys of the certificate authorities are: the interface for signers, and the one that keeps them in files.

A hardware or cloud signer fills `KeyStore`: `create` makes a key inside it and gives back how to find it again, and an
object with the interface of `cryptography`'s private keys (`public_key()`, `sign()`) that delegates. Nothing here or
elsewhere ever asks such a key for its private bytes; only `FileKeyStore` writes some, and encrypted.
"""

import os
import re
import secrets
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from models.errors import InvalidInputError, NotFoundError
from models.settings import Settings
from pki.keys import IssuerPrivateKey, spki_sha256

LEAST_PASSPHRASE_BYTES = 16
"""Whoever copies the folder may try passphrases for as long as he likes."""

_REFERENCE = re.compile(r"file:([0-9a-f]{64}\.pem)")


class KeyStore(Protocol):
    """Keys that sign certificates. `key_reference` is kept in PostgreSQL; it is no secret."""

    def create(self) -> tuple[str, IssuerPrivateKey]:
        """Make a key; its reference, and the key itself. It is durable when this returns."""

    def open(self, key_reference: str) -> IssuerPrivateKey:
        """The key of this reference. Raises NotFoundError where this store has none such."""


class FileKeyStore:
    """EC P-256 keys in a folder, each an encrypted PKCS#8 PEM that its owner alone can read."""

    def __init__(self, folder: Path, passphrase: bytes) -> None:
        self._folder = folder
        self._passphrase = passphrase

    def create(self) -> tuple[str, IssuerPrivateKey]:
        """See KeyStore."""
        key = generate_private_key(SECP256R1())
        name = f"{spki_sha256(key.public_key())}.pem"
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(self._passphrase))
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_durably(self._folder / name, pem)
        except OSError as error:
            raise InvalidInputError(f"cannot write a CA's key to {self._folder}: {error.strerror}") from error
        return f"file:{name}", key

    def open(self, key_reference: str) -> IssuerPrivateKey:
        """See KeyStore. Raises InvalidInputError for a wrong passphrase, and for what is no such key."""
        match = _REFERENCE.fullmatch(key_reference)
        if match is None:
            raise NotFoundError(
                f"the key {key_reference!r} is not one of the folder {self._folder}: expected 'file:<sha256>.pem'; "
                "it was made with another key store"
            )
        path = self._folder / match[1]
        try:
            key = load_pem_private_key(path.read_bytes(), self._passphrase)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"the CA's key {path} does not exist: it was made on another machine, or is lost; set TIDEGATE_CA_DIR "
                "to the folder that has it, restore it, or let 'starter.py ca roll' make a new CA"
            ) from error
        except OSError as error:
            raise InvalidInputError(f"cannot read the CA's key {path}: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise InvalidInputError(
                f"cannot decrypt the CA's key {path}: the passphrase is not the one it was made with, or the file is "
                f"damaged ({error}); check TIDEGATE_CA_PASSPHRASE_FILE"
            ) from error
        if not isinstance(key, EllipticCurvePrivateKey | Ed25519PrivateKey | RSAPrivateKey):
            raise InvalidInputError(f"cannot sign with {path}: expected EC, Ed25519 or RSA, found {type(key).__name__}")
        return key


def key_store(settings: Settings, *, make: bool = False) -> FileKeyStore:
    """The key store of the settings.

    Args:
        make: make the passphrase where its file is missing, and take `ca/` and `ca.passphrase` of the state directory
            for what is not set.

    Raises InvalidInputError where the settings name none, NotFoundError where the passphrase file is missing.
    """
    folder = settings.ca_dir or (settings.state_dir / "ca" if make else None)
    file = settings.ca_passphrase_file or (settings.state_dir / "ca.passphrase" if make else None)
    if folder is None or file is None:
        raise InvalidInputError(
            "no key store: set TIDEGATE_CA_DIR and TIDEGATE_CA_PASSPHRASE_FILE, or name with --state the directory of a "
            "stack that has certificate authorities"
        )
    if make and not file.exists():
        make_passphrase(file)
    return FileKeyStore(folder, read_passphrase(file))


def make_passphrase(path: Path) -> None:
    """Write a new random passphrase of 256 bits, readable by its owner alone. Leaves a file that is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_durably(path, secrets.token_hex(32).encode() + b"\n", replace=False)
    except FileExistsError:
        return
    except OSError as error:
        raise InvalidInputError(f"cannot write the passphrase of the CA keys {path}: {error.strerror}") from error


def read_passphrase(path: Path) -> bytes:
    """The passphrase in a file, without the newline at its end."""
    try:
        found = path.read_bytes().rstrip(b"\r\n")
    except FileNotFoundError as error:
        raise NotFoundError(
            f"the passphrase of the CA keys {path} does not exist; check TIDEGATE_CA_PASSPHRASE_FILE, or let "
            "'starter.py ca init' make one"
        ) from error
    except OSError as error:
        raise InvalidInputError(f"cannot read the passphrase of the CA keys {path}: {error.strerror}") from error
    if len(found) < LEAST_PASSPHRASE_BYTES:
        raise InvalidInputError(
            f"the passphrase in {path} is too short: expected at least {LEAST_PASSPHRASE_BYTES} bytes, got {len(found)}"
        )
    return found


def _write_durably(path: Path, data: bytes, *, replace: bool = True) -> None:
    """All of it or nothing, also when the power goes. Without `replace` raises FileExistsError where a file is."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
