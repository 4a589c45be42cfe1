"""A flash memory whose power can be cut: it implements the agent's Storage and loses what was not made durable.

A cut at operation n happens in one of three ways: `none` (the operation did not happen, and nothing that was pending
survives), `all` (it did, and everything pending survives), `torn` (it did, and of everything pending an arbitrary part
survives: of a file's content any of its blocks, of the names of a folder any).
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agent.storage import folder_of

BLOCK = 256
Cut = Literal["none", "all", "torn"]


class PowerCut(BaseException):
    """Not an Exception: no handler of the agent's may notice it."""


@dataclass(eq=False)
class Inode:
    """A file's content: what is there now, and what would be there after a cut."""

    now: bytes = b""
    durable: bytes = b""


@dataclass
class Flash:
    """An in-memory Storage. `cut_at` counts operations from the last `power_on`; `room` bounds `free_bytes`."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))
    cut_at: int | None = None
    cut: Cut = "none"
    room: int = 1 << 30
    operations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names: dict[str, Inode] = {}
        self._durable_names: dict[str, Inode] = {}

    def read(self, name: str) -> bytes | None:
        inode = self._names.get(name)
        return None if inode is None else inode.now

    def size(self, name: str) -> int | None:
        inode = self._names.get(name)
        return None if inode is None else len(inode.now)

    def free_bytes(self) -> int:
        return self.room

    def write(self, name: str, data: bytes) -> None:
        self._before("write", name)
        self._names.setdefault(name, Inode()).now = data
        self._after()

    def write_private(self, name: str, data: bytes) -> None:
        self.write(name, data)

    def path(self, name: str) -> Path:
        return Path(name)

    def append(self, name: str, data: bytes) -> None:
        self._before("append", name)
        self._names.setdefault(name, Inode()).now += data
        self._after()

    def sync(self, name: str) -> None:
        self._before("sync", name)
        inode = self._names[name]
        inode.durable = inode.now
        self._after()

    def rename(self, old: str, new: str) -> None:
        self._before("rename", old)
        self._names[new] = self._names.pop(old)
        self._after()

    def unlink(self, name: str) -> None:
        self._before("unlink", name)
        self._names.pop(name, None)
        self._after()

    def sync_folder(self, folder: str) -> None:
        self._before("sync_folder", folder)
        self._sync_names(folder)
        self._after()

    def power_on(self, cut_at: int | None = None, cut: Cut = "none") -> None:
        """Start counting anew, with a cut ahead or none."""
        self.operations, self.cut_at, self.cut = [], cut_at, cut

    def _sync_names(self, folder: str) -> None:
        for name in {*self._names, *self._durable_names}:
            if folder_of(name) == folder:
                self._settle_name(name, survives=True)

    def _settle_name(self, name: str, survives: bool) -> None:
        if not survives:
            return
        if name in self._names:
            self._durable_names[name] = self._names[name]
        else:
            self._durable_names.pop(name, None)

    def _before(self, operation: str, name: str) -> None:
        self.operations.append(f"{operation} {name}")
        if self.cut_at == len(self.operations) and self.cut == "none":
            self._lose(lambda: False)

    def _after(self) -> None:
        if self.cut_at == len(self.operations) and self.cut != "none":
            self._lose((lambda: True) if self.cut == "all" else (lambda: self.rng.random() < 0.5))

    def _lose(self, survives) -> None:  # type: ignore[no-untyped-def]
        for name in sorted({*self._names, *self._durable_names}):
            self._settle_name(name, survives())
        for inode in {id(inode): inode for inode in self._durable_names.values()}.values():
            if inode.now != inode.durable:
                inode.durable = _mix(inode.durable, inode.now, survives)
            inode.now = inode.durable
        self._names = dict(self._durable_names)
        self.cut_at = None
        raise PowerCut


def _mix(old: bytes, new: bytes, survives) -> bytes:  # type: ignore[no-untyped-def]
    """Any of the new blocks over the old ones; the length is either of both."""
    length = len(new) if survives() else len(old)
    blocks = (
        (new if survives() else old)[start : start + BLOCK].ljust(BLOCK, b"\0")
        for start in range(0, max(len(old), len(new)), BLOCK)
    )
    return b"".join(blocks)[:length]
