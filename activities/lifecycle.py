"""What the activities of the lifecycle workflows need of their collaborators, and what they say to devices.

`store.rotation.RotationStore`, `store.decommission.DecommissionStore`, `store.configuring.ConfiguringStore`,
`transport.publisher.Publisher`, `transport.retained.RetainedMessages` and `workflows.lifecycle_client.LifecycleFlows` are
these. Naming only what is used keeps the store out of what a workflow imports, and lets tests script them.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import orjson

from models.diagnostics import (
    AskDeviceInput,
    BootSeen,
    EndedQuestion,
    EndQuestionInput,
    LookAtBootInput,
    OpenedQuestion,
)
from models.identity import RotateCertificateInput
from models.lifecycle import (
    AskForRotationInput,
    AskToWipeInput,
    BeginDecommissionInput,
    BegunDecommission,
    CertificatesSeen,
    DueCertificate,
    EndConfigurationInput,
    EndDecommissionInput,
    EndedRotation,
    EndRotationInput,
    RetiredDevice,
    RetireDeviceInput,
    RotateFleetInput,
    RotationSeen,
    WantConfigurationInput,
    WantedConfiguration,
    WipeAsked,
)
from models.protocol import command_topic


class ConfigurationRecords(Protocol):
    """What a device is to run, and what it has said. Every method is one transaction and can be repeated."""

    async def want(self, asked: WantConfigurationInput, /) -> WantedConfiguration:
        """Write it, and wait for the device's word."""

    async def difference(self, device_id: str, version: int, /) -> bytes | None:
        """What the device has not reported yet, as it is told; None: it runs the version, or a later one."""

    async def end(self, asked: EndConfigurationInput, /) -> bool:
        """Wait no longer; whether the device runs it after all."""


class DiagnosticRecords(Protocol):
    """Questions to devices. Every method is one transaction and can be repeated."""

    async def open(self, asked: AskDeviceInput, /) -> OpenedQuestion:
        """Ask, and wait for the answer."""

    async def message(self, request_id: str, /) -> bytes | None:
        """The request as the device gets it; None: it is over, or somebody else sends it."""

    async def end(self, asked: EndQuestionInput, /) -> EndedQuestion:
        """Wait no longer; what became of it."""

    async def look_at_boot(self, asked: LookAtBootInput, /) -> BootSeen:
        """Whether the device has booted since it answered."""


class RotationRecords(Protocol):
    """Certificates of one device, and of the fleet."""

    async def look(self, device_id: str, /, *, ask: bool) -> CertificatesSeen:
        """Where a rotation begins."""

    async def ask(self, asked: AskForRotationInput, /) -> RotationSeen:
        """Wait for what is to come, and open the command."""

    async def settle(self, asked: EndRotationInput, /) -> EndedRotation:
        """Revoke all but the one that was seen to connect."""

    async def give_up(self, asked: EndRotationInput, /) -> EndedRotation:
        """The device did not come."""

    async def revert(self, asked: EndRotationInput, /) -> EndedRotation:
        """Revoke the new one."""

    async def due(
        self, asked: RotateFleetInput, limit: int, after: DueCertificate | None = None, /
    ) -> Sequence[DueCertificate]:
        """Devices to ask next."""

    async def count_due(self, asked: RotateFleetInput, /) -> int:
        """How many there are in all."""


class DecommissionRecords(Protocol):
    """The end of a device."""

    async def begin(self, asked: BeginDecommissionInput, /) -> BegunDecommission:
        """Out of every rollout."""

    async def ask_to_wipe(self, asked: AskToWipeInput, /) -> WipeAsked:
        """Open the command."""

    async def retire(self, asked: RetireDeviceInput, /) -> RetiredDevice:
        """The one transaction that ends it."""

    async def brokers_behind(self, revision: int, /) -> Sequence[str]:
        """Brokers that do not enforce it yet."""

    async def alert(self, rule: str, subject: str, text: str, /) -> None:
        """Tell people."""

    async def end(self, asked: EndDecommissionInput, /) -> None:
        """Note that it is over."""


class RetainedCleaner(Protocol):
    """Clears what a broker keeps."""

    async def clear(self, filters: Sequence[str], /) -> Sequence[str]:
        """Topics whose retained message was cleared. Raises UnavailableError while the broker does not answer."""


class DeviceFlows(Protocol):
    """Other workflows of a device."""

    async def start_rotation(self, asked: RotateCertificateInput, /) -> bool:
        """Start `rotate:<device>`; False: one runs already."""

    async def end(self, workflow_id: str, reason: str, /) -> bool:
        """End a workflow at once; False: none ran."""


class DiagnosticFlows(Protocol):
    """Workflows that ask devices how they are."""

    async def start_diagnosis(self, asked: AskDeviceInput, /) -> bool:
        """Start `diagnose:<device>/<request>`; False: it was asked before."""


def command_hint(device_id: str) -> tuple[str, bytes]:
    """Tell a device that a command waits for it: it asks what it is.

    >>> command_hint("motor-7")[0]
    'devices/motor-7/commands/notify'
    """
    return command_topic(device_id, "notify"), orjson.dumps({"timestamp": int(time.time())})
