"""Publishing a release: sign on this machine, store the bytes by their hash, record the statement."""

import hashlib
import time
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activities.artifact_store import ArtifactStore
from firmware.envelope import sign_envelope
from firmware.keys import key_id
from firmware.manifest import RELEASE_PAYLOAD_TYPE, ReleaseStatement, encode_release
from models.views import NewRelease, PublishedRelease
from store.engine import Database
from store.releases import Releases


async def publish_image(
    db: Database,
    store: ArtifactStore,
    key: Ed25519PrivateKey,
    image: bytes,
    *,
    product: str,
    version: str,
    hardware: Sequence[str],
    security_counter: int = 1,
    expires_at: int | None = None,
    published_by: str | None = None,
) -> PublishedRelease:
    """Sign, store, record. The key is used here and goes nowhere.

    Args:
        expires_at: epoch seconds after which devices refuse the release; None: never.

    Raises:
        VerificationError: a statement that no device would accept.
        ConflictError: this version exists with other bytes or another statement.
    """
    statement = ReleaseStatement(
        product=product,
        version=version,
        hardware=tuple(hardware),
        security_counter=security_counter,
        sha256=hashlib.sha256(image).hexdigest(),
        size_bytes=len(image),
        published_at=int(time.time()),
        expires_at=expires_at,
    )
    envelope = sign_envelope(encode_release(statement), RELEASE_PAYLOAD_TYPE, key)
    release = NewRelease(
        product=product,
        version=version,
        hardware=statement.hardware,
        security_counter=security_counter,
        sha256=statement.sha256,
        size_bytes=len(image),
        key_id=key_id(key.public_key()),
        envelope=envelope,
        published_by=published_by,
    )
    await Releases(db).check(release)  # before an image is uploaded in vain
    await store.put(image)
    return await Releases(db).publish(release)
