"""Two images for a demo without firmware at hand: made of real machine code, changed as a release changes it.

They are not firmware: a device model, not a processor, runs them. What matters to the demo is real: their size, their
entropy, and that a delta between them has to find moved and patched code.
"""

import random
import sys
from pathlib import Path

from models.errors import InvalidInputError

SIZE = 320 * 1024
PATCHED_BYTES = 600
INSERTED_BYTES = 1648


def demo_images(base: Path | None, image: Path | None, rng: random.Random) -> tuple[bytes, bytes]:
    """The old and the new image: the given files, or two made ones. Raises InvalidInputError."""
    if (base is None) != (image is None):
        raise InvalidInputError("give both --base and --image, or neither")
    if base is not None and image is not None:
        old, new = _read(base), _read(image)
        if old == new:
            raise InvalidInputError(f"{base} and {image} are the same image; a rollout needs two")
        return old, new
    old = _machine_code()
    changed = bytearray(old)
    for _ in range(PATCHED_BYTES):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    at = rng.randrange(len(old) // 4, len(old) // 2)
    changed[at:at] = rng.randbytes(INSERTED_BYTES)
    return old, bytes(changed)


def _machine_code() -> bytes:
    """A stretch of the Python interpreter's own executable (or of its largest library where that is too small)."""
    executable = Path(sys.executable).resolve().read_bytes()
    if len(executable) < SIZE:
        import _ctypes

        executable += Path(_ctypes.__file__).read_bytes() * (SIZE // 100_000 + 1)
    start = max(0, (len(executable) - SIZE) // 3)
    return executable[start : start + SIZE].ljust(SIZE, b"\xff")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"cannot read the image {path}: {error.strerror}") from error
    if not data:
        raise InvalidInputError(f"the image {path} is empty")
    return data
