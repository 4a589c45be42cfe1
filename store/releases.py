"""Published releases: the signed statement as it came, and what of it is asked for.

A release is never changed. Publishing the same statement again returns what is there; any other statement under the
same product and version is refused, because devices may have been told the first one already. `published_at` is not
part of the comparison: signing again at another time says the same thing.
"""

import base64
from typing import Any

import orjson
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from domain.mistakes import shown
from models.errors import ConflictError, InvalidInputError, NotFoundError
from models.ids import parse_release_ref
from models.views import NewRelease, PublishedRelease, ReleaseView
from store.engine import Database

_SELECT = """
SELECT release_id, product, version, hardware, security_counter, sha256, size_bytes, key_id, published_by, created_at,
       envelope
FROM releases
"""
_INSERT = """
INSERT INTO releases (product, version, hardware, security_counter, sha256, size_bytes, envelope, key_id, published_by)
VALUES (%(product)s, %(version)s, %(hardware)s, %(security_counter)s, %(sha256)s, %(size_bytes)s, %(envelope)s,
        %(key_id)s, %(published_by)s)
ON CONFLICT (product, version) DO NOTHING
"""


class Releases:
    """Releases in PostgreSQL."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def publish(self, release: NewRelease) -> PublishedRelease:
        """Record a release; idempotent for the same statement by the same key.

        Raises:
            ConflictError: this version exists and says something else; names what differs.
        """
        values = {**release.model_dump(), "hardware": list(release.hardware), "envelope": Jsonb(release.envelope)}
        async with self._db.pool.connection() as connection:
            created = (await connection.execute(_INSERT, values)).rowcount == 1
        known = await self.get(f"{release.product}@{release.version}")
        _refuse_other(known, release)
        return PublishedRelease(release=known, created=created)

    async def check(self, release: NewRelease) -> None:
        """Raise the ConflictError that publishing would, before an image is uploaded in vain."""
        for known in await self.list(release.product):
            if known.version == release.version:
                _refuse_other(known, release)

    async def get(self, ref: str) -> ReleaseView:
        """The release `product@version`; raises NotFoundError naming the versions there are."""
        product, version = parse_release_ref(ref)
        async with self._db.pool.connection() as connection:
            async with connection.cursor(row_factory=class_row(ReleaseView)) as cursor:
                await cursor.execute(f"{_SELECT} WHERE product = %s ORDER BY release_id".encode(), (product,))
                found = await cursor.fetchall()
        for release in found:
            if release.version == version:
                return release
        known = ", ".join(release.version for release in found[-5:])
        hint = f"published are {known}" if known else f"nothing of {product} is published; see 'release publish'"
        raise NotFoundError(f"no release {ref}: {hint}")

    async def list(self, product: str | None = None) -> list[ReleaseView]:
        """Releases, the newest first; of one product, or of all."""
        async with self._db.pool.connection() as connection:
            async with connection.cursor(row_factory=class_row(ReleaseView)) as cursor:
                await cursor.execute(
                    f"{_SELECT} WHERE %(product)s::text IS NULL OR product = %(product)s::text"
                    " ORDER BY release_id DESC".encode(),
                    {"product": product},
                )
                return await cursor.fetchall()


def _refuse_other(known: ReleaseView, wanted: NewRelease) -> None:
    if differing := differences(known, wanted):
        raise ConflictError(
            f"cannot publish {known.ref}: this version exists and a published version never changes; "
            f"{'; '.join(differing)}. Publish under another version"
        )


def differences(known: ReleaseView, wanted: NewRelease) -> list[str]:
    """What two releases of one version say differently, for people: `sha256 is 'ab..', not 'cd..'`."""
    there, here = statement_of(known.envelope), statement_of(wanted.envelope)
    found = [
        f"{key} is {shown(there.get(key))}, not {shown(here.get(key))}"
        for key in sorted(there.keys() | here.keys())
        if key != "published_at" and there.get(key) != here.get(key)
    ]
    if known.sha256 != wanted.sha256 and not found:
        found.append(f"sha256 is {known.sha256}, not {wanted.sha256}")
    if known.key_id != wanted.key_id:
        found.append(f"it is signed by key {known.key_id[:16]}, not {wanted.key_id[:16]}")
    return found


def statement_of(envelope: dict[str, Any]) -> dict[str, Any]:
    """What a release's envelope states, for showing and comparing. It is not verified here: devices do that."""
    try:
        statement = orjson.loads(base64.b64decode(envelope["payload"], validate=True))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"cannot read a release's envelope: expected a DSSE envelope of JSON: {error}"
        ) from error
    if not isinstance(statement, dict):
        raise InvalidInputError(f"cannot read a release's envelope: expected a JSON object, got {shown(statement)}")
    return statement
