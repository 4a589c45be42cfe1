"""`release keygen | publish | list | show`: firmware images, signed on the publisher's machine.

The private key is read, signs here, and goes nowhere: what leaves this machine is the image and a signed statement.
"""

import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activities.artifact_store import ArtifactStore
from cli.command import Session, command, whoami
from cli.output import facts, size, table, when
from cli.publish import publish_image
from firmware.envelope import open_envelope
from firmware.keys import (
    generate_private_key,
    key_id,
    load_private_key,
    load_public_key,
    save_private_key,
    save_public_key,
    trusted_key,
)
from firmware.manifest import RELEASE_PAYLOAD_TYPE, decode_release
from models.errors import InvalidInputError, NotFoundError
from models.ids import PRODUCT_NAME, VERSION
from models.quantities import parse_duration
from models.views import ReleaseView
from store.releases import Releases, statement_of

app = typer.Typer(help="Releases: make keys, publish, list, show.", no_args_is_help=True)

MAX_IMAGE_BYTES = 4 * 1024**3
"""Read into memory once; larger images want another way in."""


@command(app, "keygen")
async def keygen(
    session: Session,
    out: Annotated[Path, typer.Option(metavar="DIR/NAME", help="Writes NAME.key (private) and NAME.pub (public).")],
) -> None:
    """Make a key pair for signing releases.

    Keep NAME.key on the machine that publishes, or off line; devices are given NAME.pub.
    """
    key = generate_private_key()
    private, public = _write_pair(out, key)
    made = {"private_key": str(private), "public_key": str(public), "key_id": key_id(key.public_key())}
    shown = facts([("private key", f"{private} (keep it secret)"), ("public key", public), ("key id", made["key_id"])])
    session.out.result(made, shown)


@command(app, "publish")
async def publish(
    session: Session,
    image: Annotated[Path, typer.Argument(help="Firmware image, uncompressed.")],
    product: Annotated[str, typer.Option(metavar="NAME", help="Product, as in motor-controller.")],
    hardware: Annotated[list[str], typer.Option(metavar="TYPE", help="Device type it runs on; repeat for several.")],
    version: Annotated[str, typer.Option(metavar="VERSION", help="Version, as in 1.3.0.")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="Private key that signs; never leaves this machine.")],
    security_counter: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Devices that confirmed a higher one refuse this release. Default: the product's highest so far, or 1.",
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Not to be installed after: 90d from now, or 2027-01-31.")
    ] = None,
) -> None:
    """Sign an image and publish it as PRODUCT@VERSION.

    A published version never changes: the same image again does nothing, other content is refused.
    """
    if not PRODUCT_NAME.fullmatch(product) or not VERSION.fullmatch(version):
        raise InvalidInputError(
            f"cannot publish {product!r} version {version!r}: expected letters, digits and . _ - (in a version also +), "
            "as in --product motor-controller --version 1.3.0"
        )
    private_key = load_private_key(key)
    if stat.S_IMODE(key.stat().st_mode) & 0o077:
        session.out.say(f"note: {key} can be read by others; chmod 600 {key}")
    data = _read(image)
    async with session.database() as db:
        known = await Releases(db).list(product)
        published = await publish_image(
            db,
            ArtifactStore.of(session.settings),
            private_key,
            data,
            product=product,
            version=version,
            hardware=sorted(set(hardware)),
            security_counter=_counter(security_counter, version, known),
            expires_at=_expiry(expires, datetime.now(UTC), [r for r in known if r.version == version]),
            published_by=whoami(),
        )
    session.out.result(published, facts(_facts_of(published.release)))
    session.out.say("published" if published.created else "this very release is published already; nothing changed")


@command(app, "list")
async def list_releases(
    session: Session,
    product: Annotated[str | None, typer.Option(metavar="NAME", help="Of this product only.")] = None,
) -> None:
    """List published releases, the newest first."""
    async with session.database() as db:
        found = await Releases(db).list(product)
    rows = [
        (r.ref, r.hardware, r.security_counter, size(r.size_bytes), r.sha256[:16], r.key_id[:16], when(r.created_at))
        for r in found
    ]
    columns = ("release", "hardware", "counter", "size", "sha256", "signed by", "published")
    shown = [table("", columns, rows, right=("counter", "size"))] if rows else []
    session.out.result({"releases": [r.model_dump(mode="json", exclude={"envelope"}) for r in found]}, shown)
    if not found:
        session.out.say("no release; 'release publish' makes one")


@command(app, "show")
async def show_release(
    session: Session,
    release: Annotated[str, typer.Argument(metavar="PRODUCT@VERSION")],
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Public key (NAME.pub): check the signature as a device would.")
    ] = None,
) -> None:
    """Show a release and its signed statement."""
    async with session.database() as db:
        found = await Releases(db).get(release)
    if key is not None:
        payload = open_envelope(found.envelope, RELEASE_PAYLOAD_TYPE, [trusted_key(load_public_key(key))])
        decode_release(payload)
    session.out.result(found, facts(_facts_of(found)))
    if key is not None:
        session.out.say(f"the signature holds for {key}")


def _write_pair(out: Path, key: Ed25519PrivateKey) -> tuple[Path, Path]:
    """Both halves, or none: the public one goes first, and its name is refused where it is taken."""
    private, public = Path(f"{out}.key"), Path(f"{out}.pub")
    if private.exists():
        save_private_key(private, key)  # raises
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_public_key(public, key.public_key())
        save_private_key(private, key)
    except OSError as error:
        raise InvalidInputError(f"cannot write a key to {out}: {error.strerror}") from error
    return private, public


def _facts_of(release: ReleaseView) -> Iterator[tuple[str, object]]:
    statement = statement_of(release.envelope)
    expires = statement.get("expires_at")
    yield "release", release.ref
    yield "hardware", release.hardware
    yield "security counter", release.security_counter
    yield "size", f"{release.size_bytes} bytes ({size(release.size_bytes)})"
    yield "sha256", release.sha256
    yield "signed by", release.key_id
    yield "signed at", when(datetime.fromtimestamp(int(statement["published_at"]), UTC))
    yield "expires", when(datetime.fromtimestamp(int(expires), UTC)) if expires is not None else None
    yield "published by", release.published_by
    yield "published", release.created_at


def _read(image: Path) -> bytes:
    try:
        if image.stat().st_size > MAX_IMAGE_BYTES:
            raise InvalidInputError(f"cannot publish {image}: larger than {size(MAX_IMAGE_BYTES)}")
        data = image.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot publish {image}: there is no such file") from error
    except OSError as error:
        raise InvalidInputError(f"cannot publish {image}: {error.strerror}") from error
    if not data:
        raise InvalidInputError(f"cannot publish {image}: the file is empty")
    return data


def _counter(given: int | None, version: str, known: list[ReleaseView]) -> int:
    """What was given; else what this version was published with; else the highest of the product so far, or 1."""
    if given is not None:
        return given
    same = [release.security_counter for release in known if release.version == version]
    return same[0] if same else max((release.security_counter for release in known), default=1)


def _expiry(expires: str | None, now: datetime, published: list[ReleaseView]) -> int | None:
    """`90d` from now, or a date or time (UTC where it names no zone), as epoch seconds.

    `90d` said again means the moment it meant when this version was published.
    """
    if expires is None:
        return None
    try:
        moment = _date_of(expires)
        if moment is None:
            moment = now + parse_duration(expires)
            if published and (before := statement_of(published[0].envelope).get("expires_at")) is not None:
                return int(before)
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(f"cannot publish: --expires: expected 90d or 2027-01-31, got {expires!r}") from error
    if moment <= now:
        raise InvalidInputError(f"cannot publish: --expires {expires}: {when(moment)} is over, expected a time to come")
    return int(moment.timestamp())


def _date_of(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
