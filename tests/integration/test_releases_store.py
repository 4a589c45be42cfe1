"""Releases in a real PostgreSQL: published once, never changed."""

import asyncio
import hashlib
from typing import Any

import pytest

from firmware.envelope import sign_envelope
from firmware.keys import generate_private_key, key_id
from firmware.manifest import RELEASE_PAYLOAD_TYPE, ReleaseStatement, encode_release
from models.errors import ConflictError, InvalidInputError, NotFoundError
from models.views import NewRelease
from store.engine import Database
from store.releases import Releases, statement_of

KEY = generate_private_key()


def release(version: str = "1.3.0", image: bytes = b"image", published_at: int = 1000, **changes: Any) -> NewRelease:
    """A signed release of motor-controller."""
    key = changes.pop("key", KEY)
    sha256 = hashlib.sha256(image).hexdigest()
    statement = ReleaseStatement(
        product="motor-controller",
        version=version,
        hardware=changes.pop("hardware", ("motor",)),
        security_counter=changes.pop("security_counter", 1),
        sha256=sha256,
        size_bytes=len(image),
        published_at=published_at,
        expires_at=changes.pop("expires_at", None),
    )
    return NewRelease(
        product=statement.product,
        version=version,
        hardware=statement.hardware,
        security_counter=statement.security_counter,
        sha256=sha256,
        size_bytes=len(image),
        key_id=key_id(key.public_key()),
        envelope=sign_envelope(encode_release(statement), RELEASE_PAYLOAD_TYPE, key),
        published_by="anna",
    )


async def test_a_release_is_kept_as_it_was_signed(db: Database) -> None:
    wanted = release()
    published = await Releases(db).publish(wanted)
    assert published.created
    found = await Releases(db).get("motor-controller@1.3.0")
    assert found == published.release
    assert (found.envelope, found.hardware, found.published_by) == (wanted.envelope, ("motor",), "anna")
    assert statement_of(found.envelope)["sha256"] == found.sha256


async def test_publishing_the_same_statement_again_keeps_the_first_signature(db: Database) -> None:
    first = await Releases(db).publish(release(published_at=1000))
    again = await Releases(db).publish(release(published_at=2000))
    assert not again.created
    assert again.release == first.release


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (release(image=b"other"), "sha256 is"),
        (release(hardware=("motor", "pump")), "hardware is"),
        (release(security_counter=2), "security_counter is 1, not 2"),
        (release(expires_at=5000), "expires_at is nothing, not 5000"),
        (release(key=generate_private_key()), "it is signed by key"),
    ],
)
async def test_a_published_version_never_changes(db: Database, other: NewRelease, named: str) -> None:
    first = await Releases(db).publish(release())
    with pytest.raises(ConflictError, match="this version exists and a published version never changes") as refused:
        await Releases(db).publish(other)
    assert named in str(refused.value)
    assert await Releases(db).list() == [first.release]


async def test_one_of_two_publishers_at_once_wins_and_the_other_is_told(db: Database) -> None:
    attempts = [Releases(db).publish(release(image=bytes([i]))) for i in range(8)]
    results = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(isinstance(result, ConflictError) for result in results) == 7
    assert len(await Releases(db).list()) == 1


async def test_releases_are_listed_newest_first_and_by_product(db: Database) -> None:
    for version in ("1.3.0", "1.10.0", "1.4.0"):
        await Releases(db).publish(release(version))
    assert [r.ref for r in await Releases(db).list("motor-controller")] == [
        "motor-controller@1.4.0",
        "motor-controller@1.10.0",
        "motor-controller@1.3.0",
    ]
    assert await Releases(db).list("' OR '1'='1") == []


async def test_a_version_that_is_not_there_names_those_that_are(db: Database) -> None:
    await Releases(db).publish(release())
    with pytest.raises(NotFoundError, match=r"no release motor-controller@1\.3: published are 1\.3\.0"):
        await Releases(db).get("motor-controller@1.3")
    with pytest.raises(NotFoundError, match="nothing of pump is published"):
        await Releases(db).get("pump@1.0")
    with pytest.raises(InvalidInputError, match="expected product@version"):
        await Releases(db).get("motor-controller")


@pytest.mark.parametrize("envelope", [{}, {"payload": "*"}, {"payload": "MQ=="}, {"payload": None}])
def test_an_envelope_that_is_none_is_refused(envelope: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="cannot read a release's envelope"):
        statement_of(envelope)
