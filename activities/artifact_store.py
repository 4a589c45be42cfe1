"""Where images and deltas are kept: a folder, S3, GCS or Azure, by URL. Content-addressed, so nothing is ever replaced.

An artifact's key is `artifacts/<sha256>`, built here from 64 hex digits and nothing else: no name from outside ever
becomes a path. What is read is hashed before it is returned; a store that serves other bytes is found out.

>>> ArtifactStore.url("http://cdn.example/firmware/", "ab" * 32)[:46]
'http://cdn.example/firmware/artifacts/abababab'
"""

import asyncio
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from models.errors import InvalidInputError, NotFoundError, UnavailableError, VerificationError
from models.ids import SHA256
from models.settings import Settings

if TYPE_CHECKING:
    from obstore.store import ObjectStore

FOLDER = "artifacts"


def artifact_key(sha256: str) -> str:
    """`artifacts/<sha256>`; raises InvalidInputError for anything but 64 lower-case hex digits."""
    if not SHA256.fullmatch(sha256):
        raise InvalidInputError(f"not an artifact: {sha256[:80]!r}, expected a sha256 of 64 lower-case hex digits")
    return f"{FOLDER}/{sha256}"


@dataclass(frozen=True)
class ArtifactStore:
    """Images and deltas by their sha256."""

    store: "ObjectStore"

    @classmethod
    def open(cls, url: str) -> "ArtifactStore":
        """The store at `file:///folder` (made if missing), `s3://bucket/prefix`, `gs://...` or `az://...`.

        Credentials and endpoints come from the environment, under the names that the services' own tools use.
        Raises InvalidInputError for a URL that names no store.
        """
        try:
            if url.startswith("file:"):
                return cls(from_url(url, mkdir=True))
            return cls(from_url(url))
        except (BaseError, ValueError, OSError) as error:
            raise InvalidInputError(
                f"cannot open the artifact store {url!r}: expected file:///folder or s3://bucket/prefix: {_first(error)}"
            ) from error

    @classmethod
    def of(cls, settings: Settings) -> "ArtifactStore":
        """The store that the settings name."""
        if settings.artifact_store is None:
            raise InvalidInputError(
                "cannot open the artifact store: no address; start the stack with 'starter.py up', "
                "or set TIDEGATE_ARTIFACT_STORE"
            )
        return cls.open(settings.artifact_store)

    @staticmethod
    def url(base_url: str, sha256: str) -> str:
        """Address from which devices download it: `<base_url>/artifacts/<sha256>`."""
        return f"{base_url.rstrip('/')}/{artifact_key(sha256)}"

    async def put(self, data: bytes) -> str:
        """Keep these bytes and return their sha256. Whole or not at all; what is there and intact is left alone."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not await self._is_intact(sha256):
            try:
                await obstore.put_async(self.store, artifact_key(sha256), data)
            except (BaseError, OSError) as error:
                raise _unavailable("keep", sha256, error) from error
            await asyncio.to_thread(self._sync, sha256)
        return sha256

    async def get(self, sha256: str) -> bytes:
        """The bytes of this sha256. Raises NotFoundError, or VerificationError where the store has other bytes."""
        key = artifact_key(sha256)
        try:
            result = await obstore.get_async(self.store, key)
            data = bytes(await result.bytes_async())
        except FileNotFoundError as error:
            raise NotFoundError(
                f"cannot read artifact {sha256}: the store has none; publish its release again"
            ) from error
        except (BaseError, OSError) as error:
            raise _unavailable("read", sha256, error) from error
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise VerificationError(
                f"cannot use artifact {sha256}: the store served {len(data)} bytes with sha256 {found}; "
                "it is damaged or was tampered with, publish its release again"
            )
        return data

    async def size(self, sha256: str) -> int | None:
        """Its size in bytes, None where there is none. Says nothing of its content."""
        key = artifact_key(sha256)
        try:
            return int((await obstore.head_async(self.store, key))["size"])
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise _unavailable("look for", sha256, error) from error

    async def exists(self, sha256: str) -> bool:
        """Whether there is one of this name."""
        return await self.size(sha256) is not None

    async def _is_intact(self, sha256: str) -> bool:
        """Whether it is there with its own content: a file cut short by a power failure is written again."""
        try:
            result = await obstore.get_async(self.store, artifact_key(sha256))
            digest = hashlib.sha256()
            async for chunk in result.stream():
                digest.update(chunk)
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise _unavailable("look for", sha256, error) from error
        return digest.hexdigest() == sha256

    def _sync(self, sha256: str) -> None:
        """Make a local file outlast a power failure; object_store renames without it."""
        if not isinstance(self.store, LocalStore) or self.store.prefix is None:
            return
        path = Path(self.store.prefix) / artifact_key(sha256)
        for target in (path, path.parent, path.parent.parent):
            descriptor = os.open(target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _first(error: Exception) -> str:
    """The first line: obstore appends pages of debug output."""
    return str(error).partition("\n")[0]


def _unavailable(what: str, sha256: str, error: Exception) -> UnavailableError:
    return UnavailableError(f"cannot {what} artifact {sha256} in the artifact store: {_first(error)}")
