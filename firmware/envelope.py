"""DSSE envelopes: signing bytes, and getting bytes back only if enough trusted keys have signed exactly these.

The signature covers the payload type and the payload (DSSE v1's PAE), so an order cannot be presented as a release. It
is checked over the exact bytes before anything looks into them; what they mean is firmware.manifest's business.

Format and cryptography are securesystemslib's. Two of its habits are fenced in here: `Envelope.from_dict` destroys the
dict it is given, so it gets a copy; `Envelope.verify` counts key ids, so the counting of distinct keys is done here.

>>> from firmware.keys import generate_private_key, trusted_key
>>> key = generate_private_key()
>>> open_envelope(sign_envelope(b"{}", "text/x", key), "text/x", [trusted_key(key.public_key())])
b'{}'
"""

from binascii import b2a_base64
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import SSlibKey

from firmware.errors import EnvelopeError, SignatureError
from firmware.keys import key_id

MAX_PAYLOAD_BYTES = 8 * 1024
"""No statement but a task comes near; a larger payload is refused before any work is done on it."""
MAX_SIGNATURES = 8
"""Bounds the verifications that one envelope can cost."""

_MAX_KEY_ID_CHARS = 128
_MAX_SIGNATURE_CHARS = 128


class EnvelopeSigner:
    """Signs payloads of one type with one key; what can be prepared is prepared once."""

    def __init__(
        self, private_key: Ed25519PrivateKey, payload_type: str, *, max_bytes: int = MAX_PAYLOAD_BYTES
    ) -> None:
        self._sign = private_key.sign
        self._payload_type = payload_type
        self._max_bytes = max_bytes
        self._key_id = key_id(private_key.public_key())

    def sign(self, payload: bytes) -> dict[str, Any]:
        """A DSSE envelope, ready for JSON. Raises EnvelopeError for a payload that no device would accept."""
        if len(payload) > self._max_bytes:
            raise EnvelopeError(f"cannot sign: payload of {len(payload)} bytes, at most {self._max_bytes} expected")
        signature = self._sign(Envelope(payload, self._payload_type, {}).pae())
        return {
            "payload": b2a_base64(payload, newline=False).decode("ascii"),
            "payloadType": self._payload_type,
            "signatures": [{"keyid": self._key_id, "sig": b2a_base64(signature, newline=False).decode("ascii")}],
        }


def sign_envelope(
    payload: bytes, payload_type: str, key: Ed25519PrivateKey, *, max_bytes: int = MAX_PAYLOAD_BYTES
) -> dict[str, Any]:
    """One envelope; see EnvelopeSigner for many."""
    return EnvelopeSigner(key, payload_type, max_bytes=max_bytes).sign(payload)


def open_envelope(
    envelope: Mapping[str, Any],
    payload_type: str,
    keys: Sequence[SSlibKey],
    threshold: int = 1,
    *,
    max_bytes: int = MAX_PAYLOAD_BYTES,
) -> bytes:
    """The payload, if at least `threshold` distinct keys of `keys` have signed it as `payload_type`.

    Args:
        envelope: `{"payload", "payloadType", "signatures"}` as parsed from JSON; it is not changed.
        payload_type: what the caller is about to read it as.
        keys: the keys of one role.
        threshold: how many different keys must have signed.
        max_bytes: the largest payload of this type; a larger one is refused before any work is done on it.

    Raises:
        EnvelopeError: it is malformed, oversized, or of another type.
        SignatureError: too few of the keys have signed it.
    """
    parsed = _parse(envelope, payload_type, max_bytes)
    signed_by = _signers(parsed, keys)
    if threshold < 1 or len(signed_by) < threshold:
        raise SignatureError(
            f"cannot accept the envelope ({payload_type}): signed by {len(signed_by)} of {len(keys)} trusted keys, "
            f"{max(threshold, 1)} needed"
        )
    return bytes(parsed.payload)


def _signers(envelope: Envelope, keys: Sequence[SSlibKey]) -> set[bytes]:
    """The raw public keys that have signed. A set of keys, not of key ids: one key under two ids is one signer."""
    signed_by: set[bytes] = set()
    pae = envelope.pae()
    for key in keys:
        signature = envelope.signatures.get(key.keyid)
        if signature is None:
            continue
        try:
            key.verify_signature(signature, pae)
        except UnverifiedSignatureError:
            continue
        signed_by.add(bytes.fromhex(key.keyval["public"]))
    return signed_by


def _parse(envelope: Mapping[str, Any], payload_type: str, max_bytes: int) -> Envelope:
    if not isinstance(envelope, Mapping):
        raise EnvelopeError(f"cannot read the envelope: expected an object, found {type(envelope).__name__}")
    payload, signatures = envelope.get("payload"), envelope.get("signatures")
    if envelope.get("payloadType") != payload_type:
        raise EnvelopeError(
            f"cannot read the envelope: expected {payload_type}, found {envelope.get('payloadType')!r:.80}"
        )
    if not isinstance(payload, str) or len(payload) > 4 * ((max_bytes + 2) // 3):
        raise EnvelopeError(f"cannot read the envelope: expected a payload of at most {max_bytes} bytes in base64")
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise EnvelopeError(f"cannot read the envelope: expected 1 to {MAX_SIGNATURES} signatures")
    try:
        return Envelope.from_dict(
            {"payload": payload, "payloadType": payload_type, "signatures": [_signature(entry) for entry in signatures]}
        )
    except ValueError as error:
        raise EnvelopeError(f"cannot read the envelope: {error!s:.200}") from error


def _signature(entry: Any) -> dict[str, str]:
    if not isinstance(entry, Mapping):
        raise EnvelopeError("cannot read the envelope: a signature is not an object")
    keyid, sig = entry.get("keyid"), entry.get("sig")
    if not isinstance(keyid, str) or not isinstance(sig, str):
        raise EnvelopeError("cannot read the envelope: a signature lacks keyid or sig")
    if len(keyid) > _MAX_KEY_ID_CHARS or len(sig) > _MAX_SIGNATURE_CHARS:
        raise EnvelopeError("cannot read the envelope: keyid or sig of a signature is longer than any of ours")
    return {"keyid": keyid, "sig": sig}
