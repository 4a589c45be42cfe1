"""The three CAs for tests, with their keys in a folder as a worker reads them."""

import secrets
from datetime import UTC, datetime
from pathlib import Path

from activities.authorities import ensure_authorities
from pki.signer import FileKeyStore
from store.engine import Database


async def make_authorities(db: Database, folder: Path) -> tuple[Path, Path]:
    """Make the CAs; the folder of their keys and the file of the passphrase."""
    passphrase = secrets.token_bytes(16).hex().encode()
    file, keys = folder / "ca.passphrase", folder / "ca"
    file.write_bytes(passphrase)
    file.chmod(0o600)
    await ensure_authorities(db, FileKeyStore(keys, passphrase), datetime.now(UTC), "alice")
    return keys, file
