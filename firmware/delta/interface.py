"""What a delta codec is: two functions, the second of them safe to call with bytes from an enemy."""

from abc import ABC, abstractmethod
from typing import ClassVar


class Codec(ABC):
    """One way to write the difference of two images."""

    name: ClassVar[str]
    """As in a job document's `codec`."""
    max_image_bytes: ClassVar[int]
    """Largest image, old or new, that it is used for: what bounds memory on both sides."""

    @abstractmethod
    def diff(self, base: bytes, target: bytes) -> bytes:
        """The patch. May take long and much memory: run it in a process of its own."""

    @abstractmethod
    def apply(self, base: bytes, patch: bytes, *, base_sha256: str, target_sha256: str, target_size: int) -> bytes:
        """The target image, and only that.

        `patch` is not trusted. Time and memory are bounded by `target_size` and the length of `base`, whatever it says.

        Args:
            base: the image that runs.
            patch: the delta as downloaded.
            base_sha256: what the delta was made from.
            target_sha256: from the signed release.
            target_size: from the signed release, in bytes.

        Raises:
            WrongBaseError: `base` is not the image the delta was made from.
            DeltaError: the patch is malformed, exceeds its bounds, or gives anything but the signed image.
        """
