"""bsdiff4 for whole images, with a reader that trusts nothing.

`bsdiff4.patch` inflates whatever a patch contains (1.6 kB can become 4.2 GB), and returns wrong bytes for a wrong base.
So its container is read here: every length is known from the signed size before the block it belongs to is inflated,
and every step of the control block is checked before the C code runs.

The format (C. Percival's bsdiff 4.0): `BSDIFF40`, three 8-byte lengths (compressed control block, compressed diff
block, new image), then bzip2 streams of control, diff and extra block. The control block is a list of triples (x, y, z):
add x bytes of the diff block to the old image, copy y bytes of the extra block, move on by z in the old image. Numbers
are little-endian sign and magnitude. Therefore sum(x) is the length of the diff block, sum(y) that of the extra block,
and both together are the new image.
"""

import bz2
import hashlib
import struct
from typing import ClassVar

import bsdiff4
import bsdiff4.core

from firmware.delta.interface import Codec
from firmware.errors import DeltaError, WrongBaseError

_MAGIC = b"BSDIFF40"
_HEADER = struct.Struct("<8sQQQ")
_TRIPLE = struct.Struct("<QQQ")
_SIGN = 1 << 63

BYTES_PER_TRIPLE = 16
"""The encoder writes a triple only for a match of more than 8 bytes; real images have one per 400 bytes and more."""
SPARE_TRIPLES = 64
SPARE_PATCH_BYTES = 4096
"""bzip2 makes small or random input longer: 1 % and some hundred bytes for each of three streams."""


class Bsdiff4(Codec):
    """Codec `bsdiff4`: the smallest deltas of the simple ones; 17 times the old image in memory to make."""

    name: ClassVar[str] = "bsdiff4"
    max_image_bytes: ClassVar[int] = 16 * 2**20

    def diff(self, base: bytes, target: bytes) -> bytes:
        """The patch. Long runs of equal bytes can make it take hours: give it a deadline."""
        patch: bytes = bsdiff4.diff(base, target)
        return patch

    def apply(self, base: bytes, patch: bytes, *, base_sha256: str, target_sha256: str, target_size: int) -> bytes:
        """See Codec.apply."""
        found = hashlib.sha256(base).hexdigest()
        if found != base_sha256:
            raise WrongBaseError(
                f"cannot apply the delta: it is for the image {base_sha256[:16]}, this is {found[:16]}"
            )
        control, diff, extra = _read(patch, len(base), target_size)
        try:
            target: bytes = bsdiff4.core.patch(base, target_size, control, diff, extra)
        except (ValueError, MemoryError) as error:
            raise DeltaError(f"cannot apply the delta: {error}") from error
        found = hashlib.sha256(target).hexdigest()
        if found != target_sha256:
            raise DeltaError(f"cannot apply the delta: expected the image {target_sha256[:16]}, it gives {found[:16]}")
        return target


def _read(patch: bytes, base_size: int, target_size: int) -> tuple[bytes, bytes, bytes]:
    """Control, diff and extra block of a patch that keeps every bound."""
    most = target_size + target_size // 64 + SPARE_PATCH_BYTES
    if not _HEADER.size <= len(patch) <= most:
        raise DeltaError(f"cannot read the delta: {len(patch)} bytes, expected {_HEADER.size} to {most}")
    magic, control_size, diff_size, new_size = _HEADER.unpack_from(patch)
    if magic != _MAGIC:
        raise DeltaError(f"cannot read the delta: it starts with {magic!r}, expected {_MAGIC!r}")
    if new_size != target_size:
        raise DeltaError(f"cannot read the delta: it is for an image of {new_size} bytes, expected {target_size}")
    blocks = memoryview(patch)[_HEADER.size :]
    if control_size + diff_size > len(blocks):
        raise DeltaError(
            f"cannot read the delta: blocks of {control_size} and {diff_size} bytes in {len(blocks)} bytes of patch"
        )
    most_control = _TRIPLE.size * (target_size // BYTES_PER_TRIPLE + SPARE_TRIPLES)
    control = _inflate(blocks[:control_size], most_control, "control")
    diff_bytes, extra_bytes = _check_control(control, base_size, target_size)
    diff = _inflate(blocks[control_size : control_size + diff_size], diff_bytes, "diff")
    extra = _inflate(blocks[control_size + diff_size :], extra_bytes, "extra")
    if len(diff) != diff_bytes or len(extra) != extra_bytes:
        raise DeltaError(
            f"cannot read the delta: diff and extra block have {len(diff)} and {len(extra)} bytes, "
            f"the control block uses {diff_bytes} and {extra_bytes}"
        )
    return control, diff, extra


def _inflate(block: memoryview, most: int, name: str) -> bytes:
    """One whole bzip2 stream of at most `most` bytes, and nothing behind it."""
    stream = bz2.BZ2Decompressor()
    try:
        data = stream.decompress(block, max_length=most + 1)
        while len(data) <= most and not stream.eof and not stream.needs_input:
            data += stream.decompress(b"", max_length=most + 1 - len(data))
    except (OSError, ValueError) as error:
        raise DeltaError(f"cannot read the delta: {name} block: {error}") from error
    if len(data) > most:
        raise DeltaError(f"cannot read the delta: {name} block inflates to more than the {most} bytes it may have")
    if not stream.eof or stream.unused_data:
        raise DeltaError(f"cannot read the delta: {name} block is cut short or has bytes behind its end")
    return data


def _check_control(control: bytes, base_size: int, target_size: int) -> tuple[int, int]:
    """Lengths that the diff and the extra block must have. Walks the control block as the decoder will."""
    if len(control) % _TRIPLE.size:
        raise DeltaError(f"cannot read the delta: control block of {len(control)} bytes is no list of triples")
    added = copied = position = 0
    for add, copy, move in _TRIPLE.iter_unpack(control):
        added += add
        copied += copy
        position += add
        if added + copied > target_size or position > base_size:
            raise DeltaError("cannot read the delta: the control block leaves the old or the new image")
        position += move if move < _SIGN else _SIGN - move
        if not 0 <= position <= base_size:
            raise DeltaError("cannot read the delta: the control block moves out of the old image")
    if added + copied != target_size:
        raise DeltaError(f"cannot read the delta: it makes {added + copied} bytes of {target_size}")
    return added, copied
