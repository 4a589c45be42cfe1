"""What a fleet is told, and what became of it."""

from dataclasses import dataclass, field
from pathlib import Path

import orjson

from agent.client import Broker, Patience
from agent.device import Timing
from agent.enrolment import Claim, EnrolmentServer
from agent.faults import FaultPlan
from agent.tasks import Custom
from firmware.keys import TrustedKeys
from models.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class FleetDevice:
    """One device of a fleet: its thing name, the hardware that releases are matched against, and its serial number.

    A device that enrols is known by the name in its certificate; `device_id` is then the name of its folder.
    """

    device_id: str
    hardware: str
    serial_number: str = ""


@dataclass(frozen=True, slots=True)
class FleetEnrolment:
    """How the devices of a fleet get their certificates.

    `report_file` is written once all have one: how many, and how many seconds it took.
    """

    server: EnrolmentServer
    claim: Claim
    report_file: Path | None = None


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """A fleet. `state_dir` and `base` are needed in real mode; in simulate mode `base_sha256` stands for the image.

    `connections`: in simulate mode, how many MQTT connections the devices share; None gives each its own.
    `custom` does what custom tasks of fleet jobs say, in real mode; without it they are rejected.
    `ready_file` is written once every device that is not late has connected and subscribed, `report_file` at the end.
    """

    devices: tuple[FleetDevice, ...]
    keys: TrustedKeys
    broker: Broker
    faults: FaultPlan = field(default_factory=FaultPlan)
    product: str | None = None
    base_version: str = "0.0.0"
    base: Path | None = None
    base_sha256: str = "0" * 64
    state_dir: Path | None = None
    timing: Timing = field(default_factory=Timing)
    patience: Patience = field(default_factory=Patience)
    slow_bytes_per_second: float = 20_000
    late_seconds: float = 30
    simulate: bool = False
    connections: int | None = None
    ask_on_connect: bool = True
    ready_file: Path | None = None
    report_file: Path | None = None
    enrolment: FleetEnrolment | None = None
    custom: Custom | None = None


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What became of a device. `installs`: slots written. `outcomes`: last reported status by job, "" when the server
    ended it. `bricked`: nothing can be booted any more. `wiped`: its credentials are gone, by command."""

    device_id: str
    version: str
    sha256: str
    slot: str
    boots: int
    installs: int
    outcomes: dict[str, str]
    bricked: bool = False
    wiped: bool = False


@dataclass(frozen=True, slots=True)
class FleetReport:
    """What became of a fleet. CPU and time are counted from `ready` to the end, and as a whole."""

    devices: tuple[DeviceReport, ...]
    outcomes: dict[str, int]
    installs: int
    boots: int
    wall_seconds: float
    cpu_seconds: float
    cpu_seconds_whole: float
    peak_memory_mib: float

    def to_json(self) -> bytes:
        """For `report_file`."""
        return orjson.dumps(self, option=orjson.OPT_INDENT_2)


def read_devices(path: Path, limit: int | None = None) -> tuple[FleetDevice, ...]:
    """Devices from JSON lines as `device import` takes them: `device_id`, `device_type` and `serial_number` are used.

    Raises InvalidInputError naming the line.
    """
    devices = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = orjson.loads(line)
            serial = str(entry.get("serial_number") or entry["device_id"])
            devices.append(FleetDevice(str(entry["device_id"]), str(entry["device_type"]), serial))
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise InvalidInputError(
                f"{path}:{number}: expected device_id and device_type, found {line[:80]!r}"
            ) from error
    return tuple(devices[:limit])
