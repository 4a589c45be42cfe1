"""Which public keys a certificate may be about, and how keys are named. No I/O.

A key is named by what it is, never by how somebody wrote it down: `spki_sha256` is taken over our own encoding, so that
a compressed point or an odd parameter does not make two keys of one.
"""

import hashlib
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from models.errors import InvalidInputError

DevicePublicKey: TypeAlias = EllipticCurvePublicKey | Ed25519PublicKey | RSAPublicKey
"""Kinds of key that a certificate is issued for."""

IssuerPrivateKey: TypeAlias = EllipticCurvePrivateKey | Ed25519PrivateKey | RSAPrivateKey
"""Kinds of key that a CA may have. They are interfaces: one that delegates to a hardware or cloud signer is one too."""

RSA_BITS = (2048, 4096)
"""Smaller ones can be factored; larger ones cost the broker more than they give."""

_LEAST_EXPONENT = 65537
"""FIPS 186-5. With e = 1 every message is its own signature."""

_WANTED = "expected EC P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits"

_SMALL_ORDER = {
    bytes.fromhex(text)
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
}
"""Ed25519 points for which anybody can make signatures; OpenSSL accepts them. The sign bit is left out."""


def check_public_key(key: object) -> DevicePublicKey:
    """The key, when it is one of the allowed kinds and sizes. Raises InvalidInputError saying what it is instead."""
    if isinstance(key, EllipticCurvePublicKey):
        if isinstance(key.curve, SECP256R1 | SECP384R1):
            return key
        raise InvalidInputError(f"key not allowed: EC {key.curve.name}; {_WANTED}")
    if isinstance(key, Ed25519PublicKey):
        raw = key.public_bytes_raw()
        if raw[:31] + bytes([raw[31] & 0x7F]) in _SMALL_ORDER:
            raise InvalidInputError("key not allowed: an Ed25519 point of small order, anybody could sign with it")
        return key
    if isinstance(key, RSAPublicKey):
        if not RSA_BITS[0] <= key.key_size <= RSA_BITS[1]:
            raise InvalidInputError(f"key not allowed: RSA of {key.key_size} bits; {_WANTED}")
        if key.public_numbers().e < _LEAST_EXPONENT:
            raise InvalidInputError(
                f"key not allowed: RSA with exponent {key.public_numbers().e}; expected {_LEAST_EXPONENT} or more"
            )
        return key
    raise InvalidInputError(f"key not allowed: {type(key).__name__.removesuffix('PublicKey')}; {_WANTED}")


def public_der(key: DevicePublicKey) -> bytes:
    """SubjectPublicKeyInfo in our own encoding."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def spki_sha256(key: DevicePublicKey) -> str:
    """Name of a key: hex sha256 of `public_der`."""
    return hashlib.sha256(public_der(key)).hexdigest()


def hash_for(key: IssuerPrivateKey) -> SHA256 | SHA384 | None:
    """What a signature by this key hashes with; None where the kind of key has its own (Ed25519)."""
    if isinstance(key, Ed25519PrivateKey):
        return None
    if isinstance(key, EllipticCurvePrivateKey) and isinstance(key.curve, SECP384R1):
        return SHA384()
    return SHA256()
