"""Deltas from an enemy: bounded, exact, or refused (THREATS 9, 16, 17, 18)."""

import bz2
import functools
import itertools
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bsdiff4
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware.delta import BSDIFF4, CODECS, make_delta
from firmware.errors import DeltaError, WrongBaseError
from models.protocol import FailureClass
from tests.unit.firmware_samples import NEW_IMAGE, OLD_IMAGE, digest, mutant

SHARED = Path(__file__).parents[3] / "shared" / "firmware"
MODULE = "firmware.delta.bsdiff4"
SIGN = 1 << 63
Triple = tuple[int, int, int]


def apply(
    patch: bytes, base: bytes = OLD_IMAGE, target: bytes = NEW_IMAGE, codec: Any = BSDIFF4, **other: Any
) -> bytes:
    """What a device does, for these images."""
    facts = {"base_sha256": digest(base), "target_sha256": digest(target), "target_size": len(target)} | other
    made: bytes = codec.apply(base, patch, **facts)
    return made


def without(*changes: tuple[str, str]) -> Any:
    """The codec without some of its checks."""
    return mutant(MODULE, *changes).Bsdiff4()


def pack(control: bytes, diff: bytes, extra: bytes, size: int) -> bytes:
    """A patch of compressed blocks."""
    return b"BSDIFF40" + struct.pack("<QQQ", len(control), len(diff), size) + control + diff + extra


def craft(triples: list[Triple], diff: bytes, extra: bytes, size: int) -> bytes:
    """A patch of these triples; numbers as they stand in the file."""
    control = b"".join(struct.pack("<QQQ", *triple) for triple in triples)
    return pack(bz2.compress(control), bz2.compress(diff), bz2.compress(extra), size)


# --- ordinary use -----------------------------------------------------------------------------------------------------


@given(base=st.binary(max_size=400), target=st.binary(min_size=1, max_size=400), shared=st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_a_delta_of_any_two_images_gives_the_second(base: bytes, target: bytes, shared: bytes) -> None:
    old, new = base + shared + base, shared + target
    assert apply(make_delta(old, new), old, new) == new


@pytest.mark.parametrize(
    ("base", "target"), [(b"", b"x"), (b"x", b"y"), (b"\0" * 9000, b"\0" * 8000), (b"ab" * 5000, b"ab" * 5000)]
)
def test_images_at_the_edge_have_a_delta(base: bytes, target: bytes) -> None:
    assert apply(make_delta(base, target), base, target) == target


def test_real_firmware_has_a_delta_of_at_most_13_5_percent() -> None:
    names = ("micropython-pybv11-old.bin", "micropython-pybv11-new.bin")
    if not all((SHARED / name).exists() for name in names):
        pytest.skip("the real firmware images are not on this machine")
    base, target = ((SHARED / name).read_bytes() for name in names)
    patch = make_delta(base, target)
    assert len(patch) <= 0.135 * len(target)
    assert apply(patch, base, target) == target


def test_images_over_the_codecs_limit_are_refused_before_any_work() -> None:
    large = bytes(BSDIFF4.max_image_bytes + 1)
    for base, target in ((large, b"x"), (b"x", large)):
        with pytest.raises(DeltaError, match="no codec for images over 16 MiB yet"):
            make_delta(base, target)


def test_a_codec_whose_delta_does_not_give_the_image_is_found_out_before_it_is_offered() -> None:
    class Wrong(type(BSDIFF4)):  # type: ignore[misc]
        def diff(self, base: bytes, target: bytes) -> bytes:
            return super().diff(base, target[::-1])  # type: ignore[no-any-return]

    with pytest.raises(DeltaError, match="it gives"):
        make_delta(OLD_IMAGE, NEW_IMAGE, Wrong())


def test_codecs_are_found_by_the_name_in_job_documents() -> None:
    assert CODECS["bsdiff4"] is BSDIFF4


# --- 16: patch bombs --------------------------------------------------------------------------------------------------

IMAGE_BYTES = 2**20
BOMB_BYTES = 96 * 2**20


@functools.cache
def bomb() -> bytes:
    """A bzip2 stream of 96 MiB of zeros: some 80 bytes."""
    return bz2.compress(bytes(BOMB_BYTES))


@functools.cache
def image() -> bytes:
    return random.Random(16).randbytes(IMAGE_BYTES)


def whole(control: Triple) -> bytes:
    return bz2.compress(struct.pack("<QQQ", *control))


NOTHING = bz2.compress(b"")
BOMBS: dict[str, Callable[[], bytes]] = {
    "control": lambda: pack(bomb(), NOTHING, NOTHING, IMAGE_BYTES),
    "diff": lambda: pack(whole((IMAGE_BYTES, 0, 0)), bomb(), NOTHING, IMAGE_BYTES),
    "extra": lambda: pack(whole((0, IMAGE_BYTES, 0)), NOTHING, bomb(), IMAGE_BYTES),
    "result": lambda: pack(whole((0, 2**40, 0)), NOTHING, bomb(), 2**40),
}


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most memory that `work` held at once; how it ends does not matter here."""
    tracemalloc.start()
    try:
        work()
    except (DeltaError, ValueError, MemoryError):
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("block", BOMBS)
def test_a_patch_bomb_is_refused_within_three_times_the_image(block: str) -> None:
    patch = BOMBS[block]()
    assert len(patch) < 1000
    with pytest.raises(DeltaError, match=r"inflates to more than|it is for an image of"):
        apply(patch, image(), image())
    bzip2_itself = 6 * 2**20
    assert peak_bytes(lambda: apply(patch, image(), image())) < 3 * IMAGE_BYTES + bzip2_itself


@pytest.mark.parametrize("block", ["control", "diff", "extra"])
def test_the_plain_reader_blows_up_on_each_of_them(block: str) -> None:
    patch = BOMBS[block]()
    assert peak_bytes(lambda: bsdiff4.patch(image(), patch)) > BOMB_BYTES
    lax = without(("max_length=most + 1)\n", "max_length=-1)\n"))
    assert peak_bytes(lambda: apply(patch, image(), image(), codec=lax)) > BOMB_BYTES


def test_the_lengths_in_the_control_block_are_bounds_only_while_they_are_checked_against_the_signed_size() -> None:
    patch = pack(whole((0, BOMB_BYTES, 0)), NOTHING, bomb(), IMAGE_BYTES)
    assert peak_bytes(lambda: apply(patch, image(), image())) < BOMB_BYTES / 4
    unchecked = [("if added + copied > target_size or position > base_size:", "if False:")]
    unchecked.append(("if added + copied != target_size:", "if False:"))
    assert peak_bytes(lambda: apply(patch, image(), image(), codec=without(*unchecked))) > BOMB_BYTES


def test_a_flood_of_triples_that_do_nothing_is_refused() -> None:
    size = len(NEW_IMAGE)
    patch = craft([(0, 0, 0)] * 100_000 + [(0, size, 0)], b"", NEW_IMAGE, size)
    with pytest.raises(DeltaError, match="control block inflates to more than"):
        apply(patch)
    lax = without(("target_size // BYTES_PER_TRIPLE", "target_size * 1000"))
    assert apply(patch, codec=lax) == NEW_IMAGE


def test_a_patch_longer_than_any_honest_one_is_refused_unread() -> None:
    patch = make_delta(OLD_IMAGE, NEW_IMAGE)
    with pytest.raises(DeltaError, match=f"expected 32 to {len(NEW_IMAGE) + len(NEW_IMAGE) // 64 + 4096}"):
        apply(patch + bytes(len(NEW_IMAGE) + 8192))


# --- 17: crafted patches ----------------------------------------------------------------------------------------------

SIZE, BASE_SIZE = len(NEW_IMAGE), len(OLD_IMAGE)
CRAFTED = {
    "adds a negative number": craft([(SIGN | 1, 0, 0), (0, SIZE, 0)], b"", NEW_IMAGE, SIZE),
    "copies a negative number": craft([(0, SIGN | 1, 0), (0, SIZE, 0)], b"", NEW_IMAGE, SIZE),
    "adds more than there is of the old image": craft([(BASE_SIZE + 1, SIZE - BASE_SIZE - 1, 0)], NEW_IMAGE, b"", SIZE),
    "makes more than the new image": craft([(0, SIZE + 1, 0)], b"", NEW_IMAGE + b"x", SIZE),
    "makes less than the new image": craft([(0, SIZE - 1, 0)], b"", NEW_IMAGE[:-1], SIZE),
    "makes 2**64 bytes": craft([(2**64 - 1, 2**64 - 1, 0)], b"", b"", SIZE),
    "moves before the old image": craft([(0, 1, SIGN | 1), (0, SIZE - 1, 0)], b"", NEW_IMAGE, SIZE),
    "moves behind the old image": craft([(0, 1, BASE_SIZE + 1), (0, SIZE - 1, 0)], b"", NEW_IMAGE, SIZE),
    "moves by 2**63 - 1": craft([(0, 1, SIGN - 1), (1, SIZE - 2, 0)], b"x", NEW_IMAGE, SIZE),
    "has half a triple": pack(bz2.compress(bytes(12)), NOTHING, bz2.compress(NEW_IMAGE), SIZE),
    "has no triple": pack(NOTHING, NOTHING, NOTHING, SIZE),
    "has too little to add": craft([(10, SIZE - 10, 0)], b"x" * 9, NEW_IMAGE[10:], SIZE),
    "has too much to copy": craft([(0, SIZE, 0)], b"", NEW_IMAGE + b"x", SIZE),
    "has bytes behind its end": craft([(0, SIZE, 0)], b"", NEW_IMAGE, SIZE) + b"x",
    "has a second stream": craft([(0, SIZE, 0)], b"", NEW_IMAGE[:9], SIZE) + bz2.compress(NEW_IMAGE[9:]),
    "is cut short": craft([(0, SIZE, 0)], b"", NEW_IMAGE, SIZE)[:-1],
    "has blocks longer than itself": b"BSDIFF40" + struct.pack("<QQQ", 2**63 - 1, 2**63 - 1, SIZE),
    "has blocks of 2**64 - 1": b"BSDIFF40" + struct.pack("<QQQ", 2**64 - 1, 2**64 - 1, SIZE),
    "is for another size": craft([(0, SIZE - 1, 0)], b"", NEW_IMAGE[:-1], SIZE - 1),
    "is for a negative size": craft([(0, SIZE, 0)], b"", NEW_IMAGE, SIGN | SIZE),
    "is of another format": b"BSDIFF41" + craft([(0, SIZE, 0)], b"", NEW_IMAGE, SIZE)[8:],
    "is a header": b"BSDIFF40",
    "is empty": b"",
    "is not bzip2": pack(b"x" * 40, b"y" * 40, b"z" * 40, SIZE),
}


@pytest.mark.parametrize("patch", CRAFTED.values(), ids=CRAFTED.keys())
def test_a_crafted_patch_is_refused_as_what_it_is(patch: bytes) -> None:
    with pytest.raises(DeltaError, match=r"cannot read the delta") as refusal:
        apply(patch)
    assert refusal.value.failure_class is FailureClass.VERIFY


def test_a_handmade_patch_that_keeps_the_rules_is_applied() -> None:
    changed = bytes((new - old) % 256 for new, old in zip(NEW_IMAGE[:100], OLD_IMAGE[:100], strict=True))
    assert apply(craft([(100, SIZE - 100, BASE_SIZE - 100)], changed, NEW_IMAGE[100:], SIZE)) == NEW_IMAGE


def mutations(seed: int, count: int) -> list[bytes]:
    """A valid patch, damaged: in its bytes, and in its blocks under intact compression."""
    rng, patch = random.Random(seed), make_delta(OLD_IMAGE, NEW_IMAGE)
    _, control_size, diff_size, _ = struct.unpack_from("<8sQQQ", patch)
    blocks = [
        patch[32 : 32 + control_size],
        patch[32 + control_size :][:diff_size],
        patch[32 + control_size + diff_size :],
    ]
    inner = [bz2.decompress(block) for block in blocks]

    def damage(data: bytes) -> bytes:
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(damaged) + 1)
            kind = rng.random()
            if kind < 0.6 and position < len(damaged):
                damaged[position] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            elif kind < 0.8:
                del damaged[position : position + rng.randint(1, 24)]
            else:
                damaged[position:position] = rng.randbytes(rng.randint(1, 24))
        return bytes(damaged)

    def deep() -> bytes:
        which = rng.randrange(3)
        return pack(
            *(bz2.compress(damage(data) if at == which else data) for at, data in enumerate(inner)), len(NEW_IMAGE)
        )

    return [damage(patch) if rng.random() < 0.5 else deep() for _ in range(count)]


def outcomes(patches: list[bytes], codec: Any) -> list[bytes]:
    """What came out of those that were not refused."""
    made = []
    for patch in patches:
        try:
            made.append(apply(patch, codec=codec))
        except DeltaError:
            continue
    return made


def test_ten_thousand_damaged_patches_give_the_image_or_a_refusal_and_nothing_else() -> None:
    assert all(made == NEW_IMAGE for made in outcomes(mutations(17, 10_000), BSDIFF4))


def test_without_the_hash_of_the_result_some_of_them_would_give_another_image() -> None:
    lax = without(("if found != target_sha256:", "if False:"))
    assert any(made != NEW_IMAGE for made in outcomes(mutations(17, 1_000), lax))


# --- 9, 18: wrong base, wrong release ---------------------------------------------------------------------------------

IMAGES = [b"motor firmware 1.%d.0 " % minor * (300 + minor) for minor in range(3)]


def test_a_delta_is_applied_to_its_own_base_alone() -> None:
    for base, target, running in itertools.product(IMAGES, repeat=3):
        patch = make_delta(base, target)
        if running == base:
            assert apply(patch, running, target) == target
            continue
        with pytest.raises(WrongBaseError, match="it is for the image"):
            apply(patch, running, target, base_sha256=digest(base))


def test_a_delta_of_one_release_never_makes_another() -> None:
    for made_for, ordered in itertools.permutations(IMAGES[1:], 2):
        with pytest.raises(DeltaError):
            apply(make_delta(IMAGES[0], made_for), IMAGES[0], ordered)
        same_size = ordered[::-1]
        with pytest.raises(DeltaError, match="it gives"):
            apply(make_delta(IMAGES[0], ordered), IMAGES[0], same_size)


def test_one_rotten_byte_of_the_base_is_noticed() -> None:
    rotten = bytearray(OLD_IMAGE)
    rotten[len(rotten) // 2] ^= 1
    with pytest.raises(WrongBaseError):
        apply(make_delta(OLD_IMAGE, NEW_IMAGE), bytes(rotten), base_sha256=digest(OLD_IMAGE))


def test_two_hashes_hold_each_alone_and_without_both_a_wrong_base_gives_wrong_bytes() -> None:
    patch, other = make_delta(OLD_IMAGE, NEW_IMAGE), OLD_IMAGE[::-1]
    before, after = ("if found != base_sha256:", "if False:"), ("if found != target_sha256:", "if False:")
    with pytest.raises(DeltaError, match="it gives"):
        apply(patch, other, codec=without(before), base_sha256=digest(OLD_IMAGE))
    with pytest.raises(WrongBaseError):
        apply(patch, other, codec=without(after), base_sha256=digest(OLD_IMAGE))
    wrong = apply(patch, other, codec=without(before, after), base_sha256=digest(OLD_IMAGE))
    assert wrong != NEW_IMAGE
    assert wrong == bsdiff4.patch(other, patch), "as the plain reader does"
