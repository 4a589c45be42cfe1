"""The files of one Mosquitto: its configuration, who may say what, and what it has to believe. Pure: text in, text out.

Two listeners. Devices come to the first with a certificate of a device CA; their common name is their user name and their
client id, and the ACL confines them to their own topics. Gateway, worker and access keeper come to the second with a
certificate of a service CA. No CA is trusted on both, and no thing name has a dot, so neither can be taken for the
other. A third listener without identity is made only where it is asked for.

`devices.acl` has a section for each device that is denied. Mosquitto tries a user's own section before the patterns, and
`#` does not match topics that begin with `$`, so a denial takes two lines.

```python
config(MosquittoListeners(devices=8883, engine=8884), MosquittoFiles(Path("/etc/mosquitto/tidegate")))
device_acl(["motor-7"])
```
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from models.ids import THING_NAME
from models.protocol import THINGS

GATEWAY, WORKER, ACCESS = "engine.gateway", "engine.worker", "engine.access"
"""Common names of the services that connect to the engine's listener."""

CLIENT_NAMES = (GATEWAY, WORKER, ACCESS)

CANARY_PREFIX = "tidegate/access"
"""Topics under it tell the access keeper which files the broker has read."""

SHADOW_REQUESTS = ("get", "update", "delete")
SHADOW_ANSWERS = (
    "get/accepted",
    "get/rejected",
    "update/accepted",
    "update/rejected",
    "update/delta",
    "update/documents",
    "delete/accepted",
    "delete/rejected",
)
JOB_REQUESTS = ("get", "start-next", "+/get", "+/update")
DEVICE_WRITES = (
    *(f"{THINGS}/%u/jobs/{request}" for request in JOB_REQUESTS),
    *(f"{THINGS}/%u/shadow/{request}" for request in SHADOW_REQUESTS),
    *(f"{THINGS}/%u/shadow/name/+/{request}" for request in SHADOW_REQUESTS),
    "devices/%u/heartbeat",
    "devices/%u/commands/get",
    "devices/%u/commands/response",
    "devices/%u/diagnostics/response",
)
"""What a device may say: requests, never an answer, and of itself alone."""
DEVICE_READS = (
    f"{THINGS}/%u/jobs/notify",
    f"{THINGS}/%u/jobs/notify-next",
    *(f"{THINGS}/%u/jobs/{request}/{answer}" for request in JOB_REQUESTS for answer in ("accepted", "rejected")),
    *(f"{THINGS}/%u/shadow/{answer}" for answer in SHADOW_ANSWERS),
    *(f"{THINGS}/%u/shadow/name/+/{answer}" for answer in SHADOW_ANSWERS),
    "devices/%u/commands/notify",
    "devices/%u/commands/request",
    "devices/%u/diagnostics/request",
)
"""What a device may hear: answers and orders, never a request; a subscription to `jobs/#` delivers these alone."""

_DENIED = re.compile(r"^user (\S+)\ntopic deny #$", re.MULTILINE)


@dataclass(frozen=True)
class MosquittoFiles:
    """Where the files are. The access keeper writes those of `folder`; the rest is given once."""

    folder: Path
    certificate: Path
    """The server's certificate, with its chain."""
    private_key: Path
    service_ca: Path
    pid_file: Path
    persistence: Path | None = None
    """None: sessions and retained messages are lost when the broker ends."""

    @property
    def device_acl(self) -> Path:
        """The patterns, and the devices that are denied."""
        return self.folder / DEVICE_ACL

    @property
    def engine_acl(self) -> Path:
        """The services, and the canary."""
        return self.folder / ENGINE_ACL

    @property
    def device_cas(self) -> Path:
        """The device CAs that are trusted."""
        return self.folder / DEVICE_CAS

    @property
    def device_crls(self) -> Path:
        """A revocation list of each of them."""
        return self.folder / DEVICE_CRLS


DEVICE_ACL, ENGINE_ACL, DEVICE_CAS, DEVICE_CRLS = "devices.acl", "engine.acl", "devices-ca.pem", "devices.crl"


@dataclass(frozen=True)
class MosquittoListeners:
    """Ports. `open`: a listener on loopback where everybody may do everything, for simulated fleets."""

    devices: int
    engine: int
    open: int | None = None
    host: str = "127.0.0.1"
    """Address of the devices' listener and the engine's."""


_HEAD = """\
# Written by Tidegate; changes are lost.
per_listener_settings true
pid_file {pid_file}
# The gateway acknowledges after its commit, so it needs more in flight than the default of 20 (0: no limit).
max_inflight_messages 0
max_queued_messages 1000000
max_packet_size {max_packet_bytes}
# What a session that nobody comes back to may hold on to.
persistent_client_expiration 14d
log_dest stdout
log_type error
log_type warning
log_type notice
connection_messages false
"""

_PERSISTENCE = """\
persistence true
persistence_location {folder}/
autosave_interval 60
"""

_DEVICES = """
# Devices. The common name is user name and client id: nobody can take another's session.
listener {port} {host}
allow_anonymous false
require_certificate true
cafile {cafile}
crlfile {crlfile}
certfile {certfile}
keyfile {keyfile}
use_identity_as_username true
use_username_as_clientid true
acl_file {acl}
"""

_ENGINE = """
# Gateway, worker and access keeper.
listener {port} {host}
allow_anonymous false
require_certificate true
cafile {cafile}
certfile {certfile}
keyfile {keyfile}
use_identity_as_username true
acl_file {acl}
"""

_OPEN = """
# Simulated fleets, because it was asked for: no identity, no ACL. Whoever reaches it may say anything in any name.
listener {port} 127.0.0.1
allow_anonymous true
"""


def config(listeners: MosquittoListeners, files: MosquittoFiles, max_packet_bytes: int) -> str:
    """`mosquitto.conf`."""
    server = {"certfile": files.certificate, "keyfile": files.private_key, "host": listeners.host}
    parts = [_HEAD.format(pid_file=files.pid_file, max_packet_bytes=max_packet_bytes)]
    if files.persistence:
        parts.append(_PERSISTENCE.format(folder=files.persistence))
    parts.append(
        _DEVICES.format(
            port=listeners.devices, cafile=files.device_cas, crlfile=files.device_crls, acl=files.device_acl, **server
        )
    )
    parts.append(_ENGINE.format(port=listeners.engine, cafile=files.service_ca, acl=files.engine_acl, **server))
    if listeners.open is not None:
        parts.append(_OPEN.format(port=listeners.open))
    return "".join(parts)


def device_acl(denied: Iterable[str]) -> str:
    """The ACL of the devices' listener.

    Raises ValueError for a name that is no thing name: in an ACL it could be a line of its own.
    """
    lines = ["# Written by the access keeper; changes are lost.\n"]
    for name in sorted(set(denied)):
        if not THING_NAME.fullmatch(name):
            raise ValueError(f"cannot deny {name!r}: not a thing name")
        lines.append(f"user {name}\ntopic deny #\ntopic deny $aws/#\n")
    lines += (f"pattern write {topic}\n" for topic in DEVICE_WRITES)
    lines += (f"pattern read {topic}\n" for topic in DEVICE_READS)
    return "".join(lines)


def denied_in(acl: str) -> set[str]:
    """Inverse of `device_acl`: the devices it denies.

    >>> denied_in(device_acl(["motor-7"]))
    {'motor-7'}
    """
    return set(_DENIED.findall(acl))


def canary_topic(broker_id: str, generation: str) -> str:
    """Where the access keeper hears itself once the broker has read the files of this generation."""
    return f"{CANARY_PREFIX}/{broker_id}/{generation}"


def engine_acl(canary: str) -> str:
    """The ACL of the engine's listener. The access keeper may use one topic, which changes with the files."""
    lines = ["# Written by the access keeper; changes are lost.\n"]
    for name in (GATEWAY, WORKER):
        lines.append(f"user {name}\ntopic readwrite #\ntopic readwrite $aws/#\n")
    lines.append(f"user {ACCESS}\ntopic readwrite {canary}\n")
    return "".join(lines)
