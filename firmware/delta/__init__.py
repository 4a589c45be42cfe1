"""Deltas: what turns the image a device runs into the one it is to run. One codec a file, behind one interface.

A delta is derived data. It is verified by applying it before it is offered, and bounded by the signed sizes when it is
applied, so a bad one costs a device nothing but the way back to the full image.

>>> base, target = b"motor firmware 1.2" * 50, b"motor firmware 1.3" * 50
>>> patch = make_delta(base, target)
>>> digest = lambda image: hashlib.sha256(image).hexdigest()
>>> BSDIFF4.apply(base, patch, base_sha256=digest(base), target_sha256=digest(target), target_size=900) == target
True
"""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

from firmware.delta.bsdiff4 import Bsdiff4
from firmware.delta.interface import Codec
from firmware.errors import DeltaError

BSDIFF4 = Bsdiff4()

CODECS: Mapping[str, Codec] = MappingProxyType({codec.name: codec for codec in (BSDIFF4,)})
"""Every codec, by the name that job documents use."""


def too_large(codec: Codec) -> str:
    """Why there is no delta for images over the codec's limit."""
    return f"no codec for images over {codec.max_image_bytes // 2**20} MiB yet"


def make_delta(base: bytes, target: bytes, codec: Codec = BSDIFF4) -> bytes:
    """A delta from `base` to `target`, verified by applying it as a device would.

    Raises DeltaError when the codec does not take images of this size, or when its own delta does not give `target`.
    """
    if max(len(base), len(target)) > codec.max_image_bytes:
        raise DeltaError(too_large(codec))
    patch = codec.diff(base, target)
    codec.apply(
        base,
        patch,
        base_sha256=hashlib.sha256(base).hexdigest(),
        target_sha256=hashlib.sha256(target).hexdigest(),
        target_size=len(target),
    )
    return patch


__all__ = ["BSDIFF4", "CODECS", "Codec", "make_delta", "too_large"]
