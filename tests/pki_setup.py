"""Authorities, keys and key stores for tests."""

from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from models.errors import NotFoundError
from models.identity import AuthorityKind
from pki.authority import Authority, authority_name, make_authority
from pki.keys import IssuerPrivateKey

PASSPHRASE = b"a passphrase for tests alone"


def now() -> datetime:
    """To the second, as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


def new_key() -> ec.EllipticCurvePrivateKey:
    """P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def an_authority(
    kind: AuthorityKind = AuthorityKind.DEVICE, at: datetime | None = None, days: int = 3650, key: Any = None
) -> Authority:
    """A CA with its key."""
    key = key or new_key()
    return Authority(make_authority(kind, authority_name(kind), key, at or now(), days), key)


class RemoteKey(ec.EllipticCurvePrivateKey):
    """A key as a cloud signer gives it: it signs and tells its public half, and its private half is elsewhere."""

    def __init__(self, elsewhere: ec.EllipticCurvePrivateKey) -> None:
        self._elsewhere = elsewhere
        self.signatures = 0

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        assert not isinstance(signature_algorithm.algorithm, Prehashed)
        self.signatures += 1
        return self._elsewhere.sign(data, signature_algorithm)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._elsewhere.public_key()

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._elsewhere.curve

    @property
    def key_size(self) -> int:
        return self._elsewhere.key_size

    def exchange(self, *_: Any) -> bytes:
        raise AssertionError("a signer is asked for signatures alone")

    def private_numbers(self) -> Any:
        raise AssertionError("nobody may ask for the private half")

    def private_bytes(self, *_: Any) -> bytes:
        raise AssertionError("nobody may ask for the private half")

    def __copy__(self) -> "RemoteKey":
        return self

    def __deepcopy__(self, memo: Any) -> "RemoteKey":
        return self


class RemoteKeyStore:
    """A key store that is no folder."""

    def __init__(self) -> None:
        self.keys: dict[str, RemoteKey] = {}

    def create(self) -> tuple[str, IssuerPrivateKey]:
        reference = f"kms:test/{len(self.keys) + 1}"
        self.keys[reference] = RemoteKey(new_key())
        return reference, self.keys[reference]

    def open(self, key_reference: str) -> IssuerPrivateKey:
        if key_reference not in self.keys:
            raise NotFoundError(f"no key {key_reference}")
        return self.keys[key_reference]


def later(**span: float) -> datetime:
    """So long after now."""
    return now() + timedelta(**span)
