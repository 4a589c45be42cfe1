"""The supervisor with small programs: pauses that grow, a start that fails and is tried again, a piece that stays mute."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from devstack import supervisor as module
from devstack.interface import Launch, Piece
from devstack.state import StateDirectory
from devstack.supervisor import PieceEvent, Supervisor
from models.errors import UnavailableError


class Script(Piece):
    """A shell script that answers once it has made a file."""

    def __init__(self, folder: Path, script: str, name: str = "script") -> None:
        self.name = self.title = name
        self._answer = folder / f"{name}.answer"
        self._script = f"cd '{folder}'; " + script.replace("ANSWER", f"touch '{self._answer}'")

    def prepare(self) -> None:
        self._answer.unlink(missing_ok=True)

    def launch(self) -> Launch:
        return Launch(("/bin/sh", "-c", self._script))

    async def answers(self) -> bool:
        return await asyncio.to_thread(self._answer.exists)

    @property
    def address(self) -> str:
        return str(self._answer)


class Watched:
    """A supervisor whose events are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[PieceEvent] = []
        self.supervisor = Supervisor(StateDirectory(folder / "state"), self.events.append)

    async def until(self, count: int, kind: str) -> list[str]:
        """The texts of the events of this kind, as soon as there are so many."""
        async with asyncio.timeout(20):
            while len(found := [event.text for event in self.events if event.kind == kind]) < count:
                await asyncio.sleep(0.01)
        return found


@pytest_asyncio.fixture
async def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    """Pauses twenty times shorter than in earnest."""
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.4)
    found = Watched(tmp_path)
    yield found
    await found.supervisor.stop_all()


async def test_a_piece_that_keeps_crashing_is_started_again_after_pauses_that_double_up_to_a_limit(
    watched: Watched,
) -> None:
    await watched.supervisor.start(Script(watched.folder, "ANSWER; exec /bin/sleep 0.2"))
    pauses = [text.rsplit(" in ", 1)[1] for text in await watched.until(5, "ended")]
    assert pauses[:5] == ["0.1 s", "0.2 s", "0.4 s", "0.4 s", "0.4 s"]


async def test_one_that_has_run_for_long_starts_over_with_the_shortest_pause(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEADY_SECONDS", 0.15)
    await watched.supervisor.start(Script(watched.folder, "ANSWER; exec /bin/sleep 0.3"))
    pauses = [text.rsplit(" in ", 1)[1] for text in await watched.until(3, "ended")]
    assert pauses[:3] == ["0.1 s", "0.1 s", "0.1 s"]


async def test_a_restart_that_fails_is_tried_again(watched: Watched) -> None:
    # The first run answers and crashes, the second and third end before they answer, the fourth stays.
    script = "echo x >> runs; n=$(wc -l < runs); [ $n = 1 ] && ANSWER && sleep 0.3; [ $n = 4 ] && ANSWER && exec /bin/sleep 600; exit 3"
    await watched.supervisor.start(Script(watched.folder, script))
    await watched.until(2, "started")
    assert (watched.folder / "runs").read_text() == "x\n" * 4
    endings = [text.split(";")[0] for text in await watched.until(3, "ended")]
    assert endings == ["ended with exit status 3"] * 3
    assert watched.supervisor.process("script") is not None


async def test_a_piece_that_does_not_answer_in_time_is_given_up_with_the_end_of_its_log(watched: Watched) -> None:
    piece = Script(watched.folder, "echo 'no room on the device'; exec /bin/sleep 600")
    piece.ready_seconds = 0.3
    with pytest.raises(UnavailableError, match=r"(?s)script did not answer within 0 s at .*no room on the device"):
        await watched.supervisor.start(piece)


async def test_a_piece_that_ends_at_once_takes_no_time_to_give_up(watched: Watched) -> None:
    with pytest.raises(UnavailableError, match=r"(?s)script ended with exit status 7 before .*bad option"):
        await watched.supervisor.start(Script(watched.folder, "echo 'bad option'; exit 7"))


async def test_what_is_killed_between_two_starts_stays_down(watched: Watched) -> None:
    await watched.supervisor.start(Script(watched.folder, "ANSWER; exec /bin/sleep 0.1"))
    await watched.until(1, "ended")
    watched.supervisor.kill("script")
    await asyncio.sleep(0.5)
    assert watched.supervisor.process("script") is None
    assert len(await watched.until(1, "started")) == 1
    await watched.supervisor.start_again("script")
    assert len(await watched.until(2, "started")) == 2


async def test_pieces_stop_in_the_reverse_order_of_their_start(watched: Watched) -> None:
    for name in ("first", "second", "third"):
        await watched.supervisor.start(Script(watched.folder, "ANSWER; exec /bin/sleep 600", name))
    await watched.supervisor.stop_all()
    assert [event.piece.name for event in watched.events if event.kind == "stopped"] == ["third", "second", "first"]
