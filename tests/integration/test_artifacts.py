"""Deltas of a rollout: built by real processes, kept in a real store and a real PostgreSQL (THREATS 16, 20, 57, 61)."""

import asyncio
import hashlib
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import obstore
import psycopg
import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

import activities.artifacts
from activities.artifact_store import ArtifactStore
from activities.artifacts import MAX_BASES, ArtifactActivities
from activities.delta_builder import DeltaBuilder
from firmware.delta import BSDIFF4
from models.artifacts import BuildDeltaInput, DeltaRecord, DeltaRef
from models.errors import InvalidInputError, UnavailableError
from models.rollout import PrepareArtifactsInput, PrepareArtifactsResult
from store.deltas import FAILURE_KEPT, DeltaStore
from store.engine import Database

SHARED = Path(__file__).parents[3] / "shared" / "firmware"


def image(version: int, size: int = 60_000) -> bytes:
    """An image that shares most of its bytes with every other version."""
    made = bytearray(random.Random(7).randbytes(size))
    made[1000 * version : 1000 * version + 40] = random.Random(version).randbytes(40)
    return bytes(made)


def pathological(seed: int) -> bytes:
    """Long runs of zeros with a little in between, as in a file system's image: bsdiff takes minutes to hours."""
    made, rng = bytearray(4 * 2**20), random.Random(seed)
    for start in range(0, len(made), 65_536):
        made[start + 1000 * seed : start + 1000 * seed + 64] = rng.randbytes(64)
    return bytes(made)


class Documents:
    """Keeps what would be written into job documents."""

    def __init__(self) -> None:
        self.written: dict[int, list[DeltaRef]] = {}

    async def write_document(self, job_no: int, deltas: list[DeltaRef]) -> None:
        self.written[job_no] = deltas


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore.open(f"file://{tmp_path}/store")


@pytest.fixture
def prepared(db: Database, artifacts: ArtifactStore) -> ArtifactActivities:
    return ArtifactActivities(artifacts, DeltaStore(db), Documents())


@pytest.fixture
def pathological_images() -> Iterator[tuple[bytes, bytes]]:
    yield pathological(1), pathological(2)


async def put(artifacts: ArtifactStore, *images: bytes) -> list[str]:
    return [await artifacts.put(data) for data in images]


async def prepare(activity: ArtifactActivities, target: str, *bases: str, job_no: int = 1) -> PrepareArtifactsResult:
    """Run the activity as a worker would; the first base is the most frequent."""
    counted = tuple((base, 100 - place) for place, base in enumerate(bases))
    plan = PrepareArtifactsInput(job_no=job_no, target_sha256=target, bases=counted)
    return await ActivityEnvironment().run(activity.prepare_artifacts, plan)


def written(activity: ArtifactActivities, job_no: int = 1) -> list[DeltaRef]:
    assert isinstance(activity.rollouts, Documents)
    return activity.rollouts.written[job_no]


def rows(url: str) -> list[tuple[str, str | None, str | None]]:
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT base_sha256, sha256, failure FROM deltas ORDER BY created_at, base_sha256")
        return found.fetchall()


# --- building ---------------------------------------------------------------------------------------------------------


async def test_a_rollouts_deltas_are_built_once_and_turn_each_base_into_the_image(
    prepared: ArtifactActivities, artifacts: ArtifactStore
) -> None:
    new, old, older = image(3), image(2), image(1)
    target, *bases = await put(artifacts, new, old, older)
    result = await prepare(prepared, target, *bases)
    assert (result.built, result.reused, result.failed) == (2, 0, ())
    deltas = written(prepared)
    assert [delta.base_sha256 for delta in deltas] == bases
    assert result.delta_bytes == sum(delta.size_bytes for delta in deltas)
    for delta, base in zip(deltas, (old, older), strict=True):
        patch = await artifacts.get(delta.sha256)
        assert len(patch) == delta.size_bytes < len(new) / 10
        made = BSDIFF4.apply(base, patch, base_sha256=delta.base_sha256, target_sha256=target, target_size=len(new))
        assert made == new
    again = await prepare(prepared, target, *bases, job_no=2)
    assert (again.built, again.reused) == (0, 2)
    assert written(prepared, 2) == deltas


async def test_the_real_images_get_a_delta_of_at_most_13_5_percent(
    prepared: ArtifactActivities, artifacts: ArtifactStore
) -> None:
    names = ("micropython-pybv11-new.bin", "micropython-pybv11-old.bin")
    if not all((SHARED / name).exists() for name in names):
        pytest.skip("the real firmware images are not on this machine")
    new, old = ((SHARED / name).read_bytes() for name in names)
    target, base = await put(artifacts, new, old)
    assert (await prepare(prepared, target, base)).built == 1
    assert written(prepared)[0].size_bytes <= 0.135 * len(new)


async def test_the_most_frequent_bases_come_first_and_the_rarest_get_none(
    prepared: ArtifactActivities, artifacts: ArtifactStore
) -> None:
    target, *bases = await put(artifacts, *(image(version, 3000) for version in range(MAX_BASES + 3)))
    plan = PrepareArtifactsInput(
        job_no=1, target_sha256=target, bases=((target, 9999), *((base, place) for place, base in enumerate(bases)))
    )
    result = await ActivityEnvironment().run(prepared.prepare_artifacts, plan)
    assert result.built == MAX_BASES
    assert [delta.base_sha256 for delta in written(prepared)] == bases[::-1][:MAX_BASES]


async def test_two_rollouts_that_want_one_delta_at_once_end_with_one(
    prepared: ArtifactActivities, artifacts: ArtifactStore, empty_database: str
) -> None:
    target, base = await put(artifacts, image(2), image(1))
    await asyncio.gather(prepare(prepared, target, base, job_no=1), prepare(prepared, target, base, job_no=2))
    assert written(prepared, 1) == written(prepared, 2)
    assert [row[1] for row in rows(empty_database)] == [written(prepared, 1)[0].sha256]


async def test_one_delta_can_be_asked_for_by_itself(prepared: ArtifactActivities, artifacts: ArtifactStore) -> None:
    target, base = await put(artifacts, image(2), image(1))
    wanted = BuildDeltaInput(base_sha256=base, target_sha256=target)
    first = await ActivityEnvironment().run(prepared.build_delta, wanted)
    second = await ActivityEnvironment().run(prepared.build_delta, wanted)
    assert first.delta is not None
    assert (first.delta, first.reused, second.reused) == (second.delta, False, True)


async def test_a_delta_whose_file_is_gone_is_built_again(
    prepared: ArtifactActivities, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    target, base = await put(artifacts, image(2), image(1))
    await prepare(prepared, target, base)
    lost = written(prepared)[0]
    (tmp_path / "store" / "artifacts" / lost.sha256).unlink()
    assert (await prepare(prepared, target, base, job_no=2)).built == 1
    assert written(prepared, 2) == [lost]
    assert await artifacts.exists(lost.sha256)


# --- what cannot be built is a reason, and the rollout goes on --------------------------------------------------------


async def test_images_that_take_bsdiff_minutes_end_at_the_limit_of_processor_time_and_are_not_tried_again(
    prepared: ArtifactActivities, artifacts: ArtifactStore, pathological_images: tuple[bytes, bytes]
) -> None:
    target, base, good = await put(artifacts, *pathological_images, pathological_images[0][:4096])
    prepared.builder = DeltaBuilder(processor_time=timedelta(seconds=1))
    result = await prepare(prepared, target, base, good)
    assert result.failed == (f"{base[:12]}: takes more than 1 s of processor time",)
    assert [delta.base_sha256 for delta in written(prepared)] == [good]
    started = time.monotonic()
    assert (await prepare(prepared, target, base, good)).failed == result.failed
    assert time.monotonic() - started < 0.5


async def test_when_the_time_for_building_is_over_the_rollout_starts_with_what_is_ready(
    prepared: ArtifactActivities,
    artifacts: ArtifactStore,
    pathological_images: tuple[bytes, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activities.artifacts, "BUILDING_TIME", timedelta(seconds=1))
    target, slow, ready, late = await put(artifacts, *pathological_images, pathological_images[0][:4096], image(1))
    prepared.builder = DeltaBuilder(processor_time=timedelta(seconds=2))
    result = await prepare(prepared, target, ready, slow, late)
    assert result.failed[1] == f"{late[:12]}: not begun: those before it took more than 0 minutes"
    assert [delta.base_sha256 for delta in written(prepared)] == [ready]


async def test_without_the_limit_they_would_hold_the_rollout_up(
    prepared: ArtifactActivities, artifacts: ArtifactStore, pathological_images: tuple[bytes, bytes]
) -> None:
    target, base = await put(artifacts, *pathological_images)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(prepare(prepared, target, base), 4)


async def test_a_build_that_needs_more_memory_than_it_may_have_is_a_reason(
    prepared: ArtifactActivities, artifacts: ArtifactStore
) -> None:
    rng = random.Random(5)
    target, base = await put(artifacts, rng.randbytes(6 * 2**20), rng.randbytes(6 * 2**20))
    prepared.builder = DeltaBuilder(memory_bytes=96 * 2**20)
    assert (await prepare(prepared, target, base)).failed == (f"{base[:12]}: needs more than 96 MiB of memory",)
    assert written(prepared) == []


async def test_images_over_16_mib_are_served_whole(
    prepared: ArtifactActivities, artifacts: ArtifactStore, empty_database: str
) -> None:
    target, base = await put(artifacts, bytes(BSDIFF4.max_image_bytes + 1), image(1))
    result = await prepare(prepared, target, base)
    assert result.failed == (f"{base[:12]}: no codec for images over 16 MiB yet",)
    assert written(prepared) == []
    assert rows(empty_database) == [(base, None, "no codec for images over 16 MiB yet")]


async def test_a_delta_that_is_not_smaller_than_the_image_is_not_offered(
    prepared: ArtifactActivities, artifacts: ArtifactStore
) -> None:
    rng = random.Random(3)
    target, base = await put(artifacts, rng.randbytes(3000), rng.randbytes(3000))
    (failure,) = (await prepare(prepared, target, base)).failed
    assert failure.endswith("the image itself 3000")
    assert written(prepared) == []


async def test_a_base_that_was_never_published_gets_its_delta_once_it_is(
    prepared: ArtifactActivities, artifacts: ArtifactStore, empty_database: str
) -> None:
    [target] = await put(artifacts, image(2))
    base = hashlib.sha256(image(1)).hexdigest()
    (failure,) = (await prepare(prepared, target, base)).failed
    assert "the store has none" in failure
    assert rows(empty_database) == []
    await put(artifacts, image(1))
    assert (await prepare(prepared, target, base, job_no=2)).built == 1


async def test_a_base_that_the_store_serves_with_other_bytes_is_not_used(
    prepared: ArtifactActivities, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    target, base = await put(artifacts, image(2), image(1))
    (tmp_path / "store" / "artifacts" / base).write_bytes(image(5))
    (failure,) = (await prepare(prepared, target, base)).failed
    assert "damaged or was tampered with" in failure
    assert written(prepared) == []
    unchecked = await obstore.get_async(artifacts.store, f"artifacts/{base}")
    assert bytes(await unchecked.bytes_async()) == image(5), "the store itself would not have noticed"


async def test_what_devices_report_as_their_image_is_not_always_one(
    prepared: ArtifactActivities, artifacts: ArtifactStore
) -> None:
    target, base = await put(artifacts, image(2), image(1))
    result = await prepare(prepared, target, "", "unknown", "../../etc/passwd", base.upper(), base)
    assert (result.built, result.failed) == (1, ())


async def test_a_release_whose_image_is_gone_is_said_at_once(prepared: ArtifactActivities) -> None:
    with pytest.raises(ApplicationError, match="publish its release again") as refusal:
        await prepare(prepared, "ab" * 32)
    assert refusal.value.non_retryable


async def test_a_failure_is_forgotten_after_a_week_and_never_replaces_a_delta(
    db: Database, empty_database: str
) -> None:
    deltas = DeltaStore(db)
    wanted = BuildDeltaInput(base_sha256="aa" * 32, target_sha256="bb" * 32)
    assert await deltas.find(wanted) is None
    failure = DeltaRecord(failure="takes more than 1 s of processor time")
    await deltas.record(wanted, failure)
    assert await deltas.find(wanted) == failure
    with psycopg.connect(empty_database) as connection:
        connection.execute("UPDATE deltas SET created_at = now() - %s", (FAILURE_KEPT + timedelta(seconds=1),))
    assert await deltas.find(wanted) is None
    built = DeltaRecord(delta=DeltaRef(base_sha256=wanted.base_sha256, sha256="cc" * 32, size_bytes=7))
    await deltas.record(wanted, built)
    await deltas.record(wanted, failure)
    assert await deltas.find(wanted) == built


# --- the process that builds ------------------------------------------------------------------------------------------


def builders() -> set[int]:
    """Processes of this test run that make a delta."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"activities.delta_process" in command and int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(entry.name))
    return found


async def started_builder() -> int:
    """The process id of the build that runs, once it does."""
    async with asyncio.timeout(10):
        while not builders():
            await asyncio.sleep(0.02)
    return builders().pop()


async def test_a_cancelled_build_leaves_no_process(
    prepared: ArtifactActivities, artifacts: ArtifactStore, pathological_images: tuple[bytes, bytes]
) -> None:
    target, base = await put(artifacts, *pathological_images)
    running = asyncio.create_task(prepare(prepared, target, base))
    await started_builder()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert builders() == set()


async def test_a_build_that_is_killed_is_a_reason_and_the_next_rollout_tries_again(
    prepared: ArtifactActivities,
    artifacts: ArtifactStore,
    pathological_images: tuple[bytes, bytes],
    empty_database: str,
) -> None:
    target, base = await put(artifacts, *pathological_images)
    running = asyncio.create_task(prepare(prepared, target, base))
    os.kill(await started_builder(), signal.SIGKILL)
    assert (await running).failed == (f"{base[:12]}: the process that makes it ended with status -9",)
    assert written(prepared) == []
    assert rows(empty_database) == []


async def test_a_build_that_is_not_ready_by_its_deadline_is_ended(
    prepared: ArtifactActivities, artifacts: ArtifactStore, pathological_images: tuple[bytes, bytes]
) -> None:
    target, base = await put(artifacts, *pathological_images)
    prepared.builder = DeltaBuilder(deadline=timedelta(seconds=1))
    assert (await prepare(prepared, target, base)).failed == (f"{base[:12]}: not ready after 1 s",)
    assert builders() == set()


async def test_a_machine_without_room_for_temporary_files_still_rolls_out(
    prepared: ArtifactActivities, artifacts: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, base = await put(artifacts, image(2), image(1))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not-there"))
    (failure,) = (await prepare(prepared, target, base)).failed
    assert "this machine could not" in failure
    assert written(prepared) == []


async def test_heartbeats_go_on_while_a_delta_is_built(
    prepared: ArtifactActivities,
    artifacts: ArtifactStore,
    pathological_images: tuple[bytes, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activities.artifacts, "HEARTBEAT_SECONDS", 0.1)
    target, base = await put(artifacts, *pathological_images)
    prepared.builder = DeltaBuilder(processor_time=timedelta(seconds=1))
    environment, beats = ActivityEnvironment(), []
    environment.on_heartbeat = lambda *_: beats.append(time.monotonic())
    plan = PrepareArtifactsInput(job_no=1, target_sha256=target, bases=((base, 1),))
    await environment.run(prepared.prepare_artifacts, plan)
    assert len(beats) >= 5
    assert max(late - early for early, late in itertools.pairwise(beats)) < 1


# --- the artifact store -----------------------------------------------------------------------------------------------

NAMES = [
    "",
    "../x",
    "..",
    "/etc/passwd",
    "%2e%2e/x",
    "a" * 63,
    "a" * 65,
    "A" * 64,
    "g" * 64,
    "a" * 64 + "\n",
    "a" * 63 + "/",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
async def test_only_a_sha256_names_an_artifact(artifacts: ArtifactStore, name: str) -> None:
    for use in (artifacts.get, artifacts.exists, artifacts.size):
        with pytest.raises(InvalidInputError, match="expected a sha256"):
            await use(name)
    with pytest.raises(InvalidInputError, match="expected a sha256"):
        ArtifactStore.url("http://host", name)


async def test_putting_the_same_bytes_twice_writes_them_once(artifacts: ArtifactStore, tmp_path: Path) -> None:
    data = image(1)
    sha256 = await artifacts.put(data)
    before = (tmp_path / "store" / "artifacts" / sha256).stat()
    assert await artifacts.put(data) == sha256 == hashlib.sha256(data).hexdigest()
    after = (tmp_path / "store" / "artifacts" / sha256).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert await artifacts.get(sha256) == data
    assert await artifacts.size(sha256) == len(data)
    assert [path.name for path in (tmp_path / "store" / "artifacts").iterdir()] == [sha256]


async def test_a_file_cut_short_by_a_power_failure_is_mended_by_putting_it_again(
    artifacts: ArtifactStore, tmp_path: Path
) -> None:
    sha256 = await artifacts.put(image(1))
    path = tmp_path / "store" / "artifacts" / sha256
    for torn in (b"", image(1)[:-1], bytes(len(image(1)))):
        path.write_bytes(torn)
        assert await artifacts.put(image(1)) == sha256
        assert path.read_bytes() == image(1)


async def test_many_writers_of_one_artifact_leave_it_whole_at_every_moment(artifacts: ArtifactStore) -> None:
    data = random.Random(1).randbytes(3_000_000)
    sha256 = hashlib.sha256(data).hexdigest()
    writers = [asyncio.create_task(artifacts.put(data)) for _ in range(8)]
    while not all(writer.done() for writer in writers):
        if await artifacts.exists(sha256):
            assert await artifacts.get(sha256) == data
        await asyncio.sleep(0)
    assert {await writer for writer in writers} == {sha256}


def kill_while_it_writes(store: Path, script: str) -> None:
    """Run a writer and kill it once something of its file is on the disk."""
    writer = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    while writer.poll() is None and not list(store.glob("artifacts/*")):
        pass
    writer.kill()
    writer.wait()


def test_a_writer_killed_in_the_middle_leaves_nothing_under_the_artifacts_name(tmp_path: Path) -> None:
    store, data = tmp_path / "store", random.Random(9).randbytes(30_000_000)
    script = (
        "import asyncio, random; from activities.artifact_store import ArtifactStore\n"
        f"asyncio.run(ArtifactStore.open('file://{store}').put(random.Random(9).randbytes(30_000_000)))"
    )
    artifacts, sha256 = ArtifactStore.open(f"file://{store}"), hashlib.sha256(data).hexdigest()
    path = store / "artifacts" / sha256
    for _ in range(5):
        kill_while_it_writes(store, script)
        if not path.exists():
            break
        assert path.read_bytes() == data, "one that is there is whole"
        path.unlink()
    else:
        pytest.fail("five writers were all ready before they could be killed")
    assert [left.name != sha256 for left in (store / "artifacts").iterdir()] == [True], "the part that was written"
    assert asyncio.run(artifacts.put(data)) == sha256
    assert path.read_bytes() == data


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process can grow over 1 MB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_disk_without_room_leaves_what_was_published_and_nothing_else(
    artifacts: ArtifactStore, full_disk: None
) -> None:
    published = await artifacts.put(image(1))
    large = random.Random(2).randbytes(3_000_000)
    with pytest.raises(UnavailableError, match=r"cannot keep artifact .* in the artifact store"):
        await artifacts.put(large)
    assert not await artifacts.exists(hashlib.sha256(large).hexdigest())
    assert await artifacts.get(published) == image(1)


@pytest.mark.parametrize("url", ["", "nonsense", "nonsense://x", "/just/a/path"])
def test_an_address_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match=r"expected file:///folder or s3://bucket/prefix"):
        ArtifactStore.open(url)


def test_the_address_for_devices_is_the_base_and_the_hash() -> None:
    for base in ("http://127.0.0.1:8080", "http://127.0.0.1:8080/"):
        assert ArtifactStore.url(base, "ab" * 32) == f"http://127.0.0.1:8080/artifacts/{'ab' * 32}"
