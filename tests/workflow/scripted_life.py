"""A device's life played from a script: the activities' names and models, no PostgreSQL, no broker.

`asked` keeps what workflows really asked for, in order. What a device does between two questions is a list of answers,
one for each question; the last one stays.
"""

from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from temporalio import activity
from temporalio.exceptions import ApplicationError

from models.diagnostics import (
    AskDeviceInput,
    BootSeen,
    DiagnosticState,
    EndedQuestion,
    EndQuestionInput,
    LookAtBootInput,
    OpenedQuestion,
    PublishQuestionInput,
)
from models.errors import RefusedError
from models.identity import DecommissionDeviceInput, PublishCrlsInput, PublishCrlsResult, RotateCertificateInput
from models.lifecycle import (
    AskForRotationInput,
    AskToWipeInput,
    AwaitBrokersInput,
    BeginDecommissionInput,
    BegunDecommission,
    BrokersSeen,
    CertificatesSeen,
    ClearedRetained,
    ClearRetainedInput,
    ConfigurationSeen,
    EndConfigurationInput,
    EndDecommissionInput,
    EndedRotation,
    EndRotationInput,
    HintConfigurationInput,
    RetiredDevice,
    RetireDeviceInput,
    RotateFleetInput,
    RotateFleetResult,
    RotationSeen,
    StopFlowsInput,
    WantConfigurationInput,
    WantedConfiguration,
    WipeAsked,
)
from models.shadow import CheckShadowInput, EndShadowInput, ShadowSeen, WantShadowInput

OLD = CertificatesSeen(old=("old",))
SETTLED = EndedRotation(kept="new", confirmed=True, issued=True, revoked=("old",))
GIVEN_UP = EndedRotation(kept="old", reason="it did not come")
SILENT = EndedQuestion(state=DiagnosticState.TIMED_OUT, text="no answer in time")
REVERTED = EndedRotation(kept="old", issued=True, revoked=("new",), reason="it was not seen")


@dataclass
class ScriptedLife:
    """See the module."""

    refusal: str = ""
    """What the first step of each workflow is refused with."""
    fails: deque[str] = field(default_factory=deque)
    """Names of activities that fail once, as with a database that is away."""
    applied_at_once: bool = False
    applied_on_hint: int = 0
    """The hint from which on the device runs what is wanted."""
    applied_at_end: bool = False
    shadow_reported: bool = False
    """Whether the device reports what is wanted, from now on."""
    reported_on_reminder: int = 0
    certificates: CertificatesSeen = OLD
    rotation: deque[RotationSeen] = field(default_factory=lambda: deque([RotationSeen()]))
    settled: EndedRotation = SETTLED
    given_up: EndedRotation = GIVEN_UP
    reverted: EndedRotation = REVERTED
    answers: bool = True
    wiped: bool = False
    behind: tuple[str, ...] = ()
    retained_error: str = ""
    question: EndedQuestion = SILENT
    asked_before: DiagnosticState = DiagnosticState.REQUESTED
    boots: deque[float | None] = field(default_factory=lambda: deque([None]))
    """Seconds after which the device is found to have booted, one for each look; the last one stays."""
    signs: bool = True
    asked: list[Any] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def only(self, kind: type[Any]) -> list[Any]:
        """Requests of one type."""
        return [request for request in self.asked if isinstance(request, kind)]

    def _note(self, request: Any = None) -> None:
        name = activity.info().activity_type
        if self.fails and self.fails[0] == name:
            self.fails.popleft()
            raise RuntimeError("the database does not answer")
        self.asked.append(request)
        self.steps.append(name)

    def _first(self, request: Any) -> None:
        self._note(request)
        if self.refusal:
            raise RefusedError(self.refusal)

    # --- configuration ---------------------------------------------------------------------------------------------

    @activity.defn
    async def want_configuration(self, asked: WantConfigurationInput) -> WantedConfiguration:
        """A version more with each request."""
        self._first(asked)
        version = len(self.only(WantConfigurationInput))
        return WantedConfiguration(version=version, applied=self.applied_at_once)

    @activity.defn
    async def hint_configuration(self, asked: HintConfigurationInput) -> ConfigurationSeen:
        """Applied from the scripted hint on."""
        self._note(asked)
        hints = len(self.only(HintConfigurationInput))
        return ConfigurationSeen(applied=0 < self.applied_on_hint <= hints)

    @activity.defn
    async def end_configuration(self, asked: EndConfigurationInput) -> ConfigurationSeen:
        """Noted."""
        self._note(asked)
        return ConfigurationSeen(applied=self.applied_at_end)

    # --- shadows ---------------------------------------------------------------------------------------------------

    def _seen(self) -> ShadowSeen:
        confirmed = self.shadow_reported
        return ShadowSeen(version=3, confirmed=confirmed, differs={} if confirmed else {"power": "on"})

    @activity.defn
    async def want_shadow(self, asked: WantShadowInput) -> ShadowSeen:
        """Wanted."""
        self._first(asked)
        return self._seen()

    @activity.defn
    async def check_shadow(self, asked: CheckShadowInput) -> ShadowSeen:
        """Reported, where the script says so; or from the scripted reminder on."""
        self._note(asked)
        reminders = sum(check.remind for check in self.only(CheckShadowInput))
        self.shadow_reported = self.shadow_reported or 0 < self.reported_on_reminder <= reminders
        return self._seen()

    @activity.defn
    async def end_shadow(self, asked: EndShadowInput) -> ShadowSeen:
        """What is missing."""
        self._note(asked)
        seen = self._seen()
        return seen if seen.confirmed else seen.model_copy(update={"reason": "it is offline; it stays wanted"})

    # --- rotation --------------------------------------------------------------------------------------------------

    @activity.defn
    async def look_at_certificates(self, asked: RotateCertificateInput) -> CertificatesSeen:
        """As scripted."""
        self._first(asked)
        return self.certificates

    @activity.defn
    async def ask_for_rotation(self, asked: AskForRotationInput) -> RotationSeen:
        """The next answer; the last one stays."""
        self._note(asked)
        return self.rotation.popleft() if len(self.rotation) > 1 else self.rotation[0]

    @activity.defn
    async def settle_rotation(self, asked: EndRotationInput) -> EndedRotation:
        """As scripted."""
        self._note(asked)
        return self.settled

    @activity.defn
    async def give_up_rotation(self, asked: EndRotationInput) -> EndedRotation:
        """As scripted."""
        self._note(asked)
        return self.given_up

    @activity.defn
    async def revert_rotation(self, asked: EndRotationInput) -> EndedRotation:
        """As scripted."""
        self._note(asked)
        return self.reverted

    @activity.defn
    async def rotate_fleet(self, asked: RotateFleetInput) -> RotateFleetResult:
        """Three due, two asked."""
        self._note(asked)
        return RotateFleetResult(due=3, started=2, running=1)

    # --- decommissioning ---------------------------------------------------------------------------------------------

    @activity.defn
    async def begin_decommission(self, asked: BeginDecommissionInput) -> BegunDecommission:
        """As scripted."""
        self._first(asked)
        return BegunDecommission(serial_number="SN-7", answers=self.answers)

    @activity.defn
    async def stop_flows(self, asked: StopFlowsInput) -> None:
        """Noted."""
        self._note(asked)

    @activity.defn
    async def ask_to_wipe(self, asked: AskToWipeInput) -> WipeAsked:
        """As scripted."""
        self._note(asked)
        return WipeAsked(request_id="wipe-1", answered=self.wiped)

    @activity.defn
    async def retire_device(self, asked: RetireDeviceInput) -> RetiredDevice:
        """As scripted."""
        self._note(asked)
        return RetiredDevice(revision=12, wiped=self.wiped, executions_removed=1, certificates_revoked=2)

    @activity.defn(name="publish_crls")
    async def publish_crls(self, asked: PublishCrlsInput) -> PublishCrlsResult:
        """Noted, or there is no key."""
        self._note(asked)
        if not self.signs:
            raise ApplicationError("no key of the CA is here", non_retryable=True)
        return PublishCrlsResult()

    @activity.defn
    async def await_brokers(self, asked: AwaitBrokersInput) -> BrokersSeen:
        """As scripted."""
        self._note(asked)
        return BrokersSeen(behind=self.behind)

    @activity.defn
    async def clear_retained(self, asked: ClearRetainedInput) -> ClearedRetained:
        """As scripted."""
        self._note(asked)
        if self.retained_error:
            raise RuntimeError(self.retained_error)
        return ClearedRetained(topics=3)

    @activity.defn
    async def alert_retained_left(self, asked: DecommissionDeviceInput) -> None:
        """Noted."""
        self._note(asked)

    @activity.defn
    async def end_decommission(self, asked: EndDecommissionInput) -> None:
        """Noted."""
        self._note(asked)

    # --- diagnostics -------------------------------------------------------------------------------------------------

    @activity.defn
    async def open_question(self, asked: AskDeviceInput) -> OpenedQuestion:
        """As scripted."""
        self._first(asked)
        return OpenedQuestion(state=self.asked_before, expires_at=datetime.now(UTC), boot_id="b1")

    @activity.defn
    async def publish_question(self, asked: PublishQuestionInput) -> None:
        """Noted."""
        self._note(asked)

    @activity.defn
    async def end_question(self, asked: EndQuestionInput) -> EndedQuestion:
        """As scripted."""
        self._note(asked)
        return self.question

    @activity.defn
    async def look_at_boot(self, asked: LookAtBootInput) -> BootSeen:
        """The next look; the last one stays."""
        self._note(asked)
        return BootSeen(seconds=self.boots.popleft() if len(self.boots) > 1 else self.boots[0])

    def activities(self) -> list[Any]:
        """For a worker."""
        return [
            self.want_configuration,
            self.hint_configuration,
            self.end_configuration,
            self.want_shadow,
            self.check_shadow,
            self.end_shadow,
            self.look_at_certificates,
            self.ask_for_rotation,
            self.settle_rotation,
            self.give_up_rotation,
            self.revert_rotation,
            self.rotate_fleet,
            self.begin_decommission,
            self.stop_flows,
            self.ask_to_wipe,
            self.retire_device,
            self.publish_crls,
            self.await_brokers,
            self.clear_retained,
            self.alert_retained_left,
            self.end_decommission,
            self.open_question,
            self.publish_question,
            self.end_question,
            self.look_at_boot,
        ]
