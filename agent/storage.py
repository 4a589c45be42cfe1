"""The device's storage: few operations, each of them explicit, so that a test can cut the power at any one of them.

`write`, `append`, `rename` and `unlink` are not durable by themselves. Data is durable after `sync` of its file, a
name after `sync_folder` of its folder. `replace_durably` is the one way a state record is changed: temporary file,
sync, rename, sync of the folder (docs/design; "rename without sync" passes every ordinary test and bricks devices).

Names are relative, with `/` between folder and file. This module decides nothing; who writes what when is in slots.py
and state.py.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Protocol


class Storage(Protocol):
    """What the agent and the boot loader need of a file system. Every method may raise OSError."""

    def read(self, name: str) -> bytes | None:
        """The whole file, None where there is none."""

    def size(self, name: str) -> int | None:
        """Its length in bytes, None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Create the file, or replace its content in place. Not durable."""

    def write_private(self, name: str, data: bytes) -> None:
        """The same for a secret: no other user may read it at any moment. Not durable."""

    def append(self, name: str, data: bytes) -> None:
        """Add to its end; create it where there is none. Not durable."""

    def sync(self, name: str) -> None:
        """Make the file's content durable."""

    def rename(self, old: str, new: str) -> None:
        """Give the file another name in the same folder, replacing what had it. Not durable."""

    def unlink(self, name: str) -> None:
        """Remove the name; nothing happens where there is none. Not durable."""

    def sync_folder(self, folder: str) -> None:
        """Make the names in a folder durable."""

    def free_bytes(self) -> int:
        """Room left for new data."""

    def path(self, name: str) -> Path:
        """Where the file lies, for a library that reads files only (TLS)."""


def folder_of(name: str) -> str:
    """The folder part of a name, "" for the root."""
    return name.rpartition("/")[0]


def replace_durably(storage: Storage, name: str, data: bytes) -> None:
    """Change a file so that after a power cut it is the old or the new one, never anything else."""
    temporary = name + ".new"
    storage.write(temporary, data)
    storage.sync(temporary)
    storage.rename(temporary, name)
    storage.sync_folder(folder_of(name))


class PosixStorage:
    """A folder of a POSIX file system."""

    def __init__(self, root: Path) -> None:
        self._root = root
        for folder in ("slots", "download"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "identity").mkdir(mode=0o700, exist_ok=True)

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        try:
            return (self._root / name).stat().st_size
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        (self._root / name).write_bytes(data)

    def write_private(self, name: str, data: bytes) -> None:
        descriptor = os.open(self._root / name, os.O_WRONLY | os.O_CREAT, 0o600)  # in place, so that zeros erase
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123
            os.fchmod(descriptor, 0o600)  # a file that was there keeps its mode otherwise
            file.write(data)
            file.truncate(len(data))

    def append(self, name: str, data: bytes) -> None:
        with (self._root / name).open("ab", buffering=0) as file:
            file.write(data)

    def sync(self, name: str) -> None:
        with (self._root / name).open("rb") as file:
            os.fsync(file.fileno())

    def rename(self, old: str, new: str) -> None:
        (self._root / old).replace(self._root / new)

    def unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._root / name).unlink()

    def sync_folder(self, folder: str) -> None:
        descriptor = os.open(self._root / folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free

    def path(self, name: str) -> Path:
        return self._root / name
