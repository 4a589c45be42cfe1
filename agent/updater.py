"""The update as a state machine, independent of how the gateway is reached.

`handle` is given what `start-next` answered, and brings the device one leg further: until there is nothing to do, or
until it has to reboot. It can be called again at any moment, also after `kill -9`: what had been done is read from the
journal (state.py) and the boot record (slots.py), never from memory.

    verify -> journal -> download (delta first, full image on any failure of it) -> inactive slot -> read back -> arm
    -> reboot -> self-test -> accepted `confirming` -> confirm -> final report of what really runs

A trial is confirmed by an accepted `confirming` alone. No answer within the trial's window is a reset, which uses one
of its tries; "the execution is over" is the server's word, and the old image comes back.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from agent.bootloader import Boot
from agent.download import Downloader
from agent.errors import FlashError, UpdateError
from agent.jobs import Answer, Execution, Reports, failure_details
from agent.slots import Slot, Slots
from agent.state import DeviceState, Phase, StateStore, Update, artifacts_of
from agent.storage import Storage
from firmware.delta import CODECS
from firmware.errors import FirmwareError
from firmware.keys import TrustedKeys
from firmware.verify import DeviceFacts, VerifiedUpdate, verify_update
from models.protocol import ExecutionState, FailureClass, Step

ROOM_MARGIN_BYTES = 64 * 1024
"""Room for records beside the image and its download."""


class Leg(StrEnum):
    """IDLE: nothing more to do now. REBOOT: reset the device. WAIT: the gateway did not answer, ask again later."""

    IDLE = "idle"
    REBOOT = "reboot"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a device was made with."""

    device_id: str
    hardware: str
    keys: TrustedKeys
    product: str | None = None


SelfTest = Callable[[], Awaitable[str | None]]
"""Tests the running image; the reason why it failed, or None."""


class Updater:
    """Updates one device, from one boot to the next."""

    def __init__(
        self,
        identity: Identity,
        boot: Boot,
        storage: Storage,
        downloader: Downloader,
        clock: Callable[[], float],
        self_test: SelfTest,
    ) -> None:
        self._identity = identity
        self._boot = boot
        self._storage = storage
        self._slots = Slots(storage)
        self._store = StateStore(storage)
        self._downloader = downloader
        self._clock = clock
        self._self_test = self_test
        self._trial = boot.trial

    @property
    def on_trial(self) -> bool:
        """Whether the running image is still unconfirmed."""
        return self._trial

    @property
    def update(self) -> Update | None:
        """The update in progress, if any."""
        return self._store.state.update

    async def handle(self, execution: Execution | None, reports: Reports | None) -> Leg:
        """Go on with what the gateway answered; `execution` is None when it has nothing for this device."""
        update = self.update
        if (
            update is None
            or execution is None
            or (execution.job_id, execution.attempt) != (update.job_id, update.attempt)
        ):
            if self._trial:
                return self._give_up("the gateway knows nothing of this update any more")
            self._forget()
            if execution is None or reports is None:
                return Leg.IDLE
            return await self._start(execution, reports)
        assert reports is not None
        if self._trial and update.phase is not Phase.ARMED:
            return self._give_up("the update had failed before the reboot")
        if self._trial:
            return await self._try_out(update, reports)
        if update.phase is Phase.RESULT:
            return await self._report(reports)
        if self._boot.sha256 == update.sha256:
            self._succeed(update)
            return await self._report(reports)
        fallback = self._slots.load().fallback
        if update.phase is Phase.ARMED and fallback is not None and fallback.key == update.key:
            self._fail(FailureClass.ROLLED_BACK, fallback.reason)
            return await self._report(reports)
        return await self._start(execution, reports)

    async def _start(self, execution: Execution, reports: Reports) -> Leg:
        """Verify, and take the update as far as the reboot."""
        try:
            verified = self._verify(execution)
        except FirmwareError as error:
            return _leg(await reports.finish(ExecutionState.FAILED, self._failed(error.failure_class, str(error))))
        try:
            return await self._work(verified, reports)
        except UpdateError as error:
            self._fail(error.failure_class, str(error))
        except OSError as error:
            self._fail(FailureClass.FLASH, f"the storage refused: {error.strerror or error}")
        return await self._report(reports)

    def _verify(self, execution: Execution) -> VerifiedUpdate:
        state, record = self._store.state, self._slots.load()
        facts = DeviceFacts(
            device_id=self._identity.device_id,
            hardware=self._identity.hardware,
            product=self._identity.product or record.slot(self._boot.slot).product,
            security_floor=record.security_floor,
            running_sha256=self._boot.sha256,
            finished_orders=state.finished_orders,
            latest_known_time=state.latest_known_time,
        )
        document = execution.document
        return verify_update(document, self._identity.keys, facts, int(self._clock()), job_id=execution.job_id)

    async def _work(self, verified: VerifiedUpdate, reports: Reports) -> Leg:
        release = verified.release
        for stale in set(self._store.state.downloads).difference(artifacts_of(verified)):
            self._downloader.forget(stale)  # before the state forgets that they are there
        self._store.put(self._store.state.begun(verified))
        if release.sha256 == self._boot.sha256:
            self._succeed(self._update())
            return await self._report(reports)
        target = self._slots.ready(self._boot.slot, release.sha256)
        if target is None:
            image = await self._obtain(verified, reports)
            if image is None:
                return self._over()
            if await reports.step(Step.INSTALLING) is Answer.OVER:
                return self._over()
            target = self._slots.begin(self._boot.slot)
            self._slots.keep(target, image, _slot(verified))
            self._tidy(verified)
        return await self._arm(target, reports)

    async def _obtain(self, verified: VerifiedUpdate, reports: Reports) -> bytes | None:
        """The new image, verified, in memory. None when the gateway has ended the update meanwhile."""
        release = verified.release
        room, needed = self._storage.free_bytes(), 2 * release.size_bytes + ROOM_MARGIN_BYTES
        if room < needed:
            raise FlashError(f"no room for the update: {needed} bytes needed, {room} free")
        if await reports.step(Step.DOWNLOADING, percent="0") is Answer.OVER:
            return None
        image, via = await self._by_delta(verified), "delta"
        if image is None:
            full = verified.full
            image, via = await self._downloader.fetch(full.url, full.sha256, full.size_bytes), "full"
        self._store.put(replace(self._store.state, update=replace(self._update(), via=via)))
        answer = await reports.step(Step.DOWNLOADED, percent="100", via=via)
        return None if answer is Answer.OVER else image

    async def _by_delta(self, verified: VerifiedUpdate) -> bytes | None:
        """The image by the smallest delta that this device can apply; None on any failure: there is the full image."""
        offers = [offer for offer in verified.deltas if offer.codec in CODECS]
        if not offers:
            return None
        offer, release = offers[0], verified.release
        try:
            patch = await self._downloader.fetch(offer.url, offer.sha256, offer.size_bytes)
            return await asyncio.to_thread(
                CODECS[offer.codec].apply,
                self._slots.image(self._boot.slot),
                patch,
                base_sha256=offer.base_sha256,
                target_sha256=release.sha256,
                target_size=release.size_bytes,
            )
        except (UpdateError, FirmwareError):
            return None

    async def _arm(self, target: str, reports: Reports) -> Leg:
        """The last moment at which the gateway can stop the update; one it does not hear of would never be confirmed."""
        match await reports.step(Step.REBOOTING):
            case Answer.OVER:
                return self._over()
            case Answer.UNREACHABLE:
                return Leg.WAIT
        update = self._update()
        self._store.put(replace(self._store.state, update=replace(update, phase=Phase.ARMED)))
        self._slots.arm(target, update.key)
        return Leg.REBOOT

    async def _try_out(self, update: Update, reports: Reports) -> Leg:
        """On trial: self-test, round trip, and only then confirm."""
        problem = await self._self_test()
        if problem is not None:
            return self._give_up(f"self-test failed: {problem}")
        match await reports.step(Step.CONFIRMING):
            case Answer.OVER:
                return self._give_up("the gateway had ended the update before it was confirmed")
            case Answer.UNREACHABLE:
                return Leg.WAIT
        try:
            self._slots.confirm()
        except OSError as error:
            return self._give_up(f"the boot record cannot be written: {error.strerror or error}")
        self._trial = False
        self._succeed(update)
        return await self._report(reports)

    def _give_up(self, reason: str) -> Leg:
        """End the trial; a storage that refuses even this leaves it to the try counter."""
        with contextlib.suppress(OSError):
            self._slots.abandon(reason)
        return Leg.REBOOT

    def _succeed(self, update: Update) -> None:
        details = self._running() | ({"via": update.via} if update.via else {})
        self._result(ExecutionState.SUCCEEDED, details)

    def _fail(self, failure: FailureClass, reason: str) -> None:
        self._result(ExecutionState.FAILED, self._failed(failure, reason))

    def _failed(self, failure: FailureClass, reason: str) -> dict[str, str]:
        return failure_details(failure, reason) | self._running()

    def _running(self) -> dict[str, str]:
        """What really runs: measured by the boot loader, not taken from the order."""
        return {"version": self._boot.version, "sha256": self._boot.sha256, "slot": self._boot.slot}

    def _result(self, status: ExecutionState, details: dict[str, str]) -> None:
        update = replace(self._update(), phase=Phase.RESULT, status=status, details=details)
        self._keep(replace(self._store.state, update=update))

    async def _report(self, reports: Reports) -> Leg:
        update = self._update()
        answer = await reports.finish(ExecutionState(update.status), update.details)
        if answer is Answer.UNREACHABLE:
            return Leg.WAIT
        self._forget()
        return Leg.IDLE

    def _over(self) -> Leg:
        self._forget()
        return Leg.IDLE

    def _forget(self) -> None:
        """The update is over, here and for the server; its order never starts again."""
        if self.update is not None:
            self._keep(self._store.state.ended())

    def _keep(self, state: DeviceState) -> None:
        """Keep a state whose loss costs a repeated report at most: a full disk must not stop the report itself."""
        try:
            self._store.put(state)
        except OSError:
            self._store.state = state

    def _tidy(self, verified: VerifiedUpdate) -> None:
        for sha256 in artifacts_of(verified):
            self._downloader.forget(sha256)

    def _update(self) -> Update:
        assert self.update is not None
        return self.update


def _leg(answer: Answer) -> Leg:
    return Leg.WAIT if answer is Answer.UNREACHABLE else Leg.IDLE


def _slot(verified: VerifiedUpdate) -> Slot:
    release = verified.release
    return Slot(
        sha256=release.sha256,
        size_bytes=release.size_bytes,
        version=release.version,
        product=release.product,
        security_counter=release.security_counter,
    )
