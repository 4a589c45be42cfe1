"""An agent process that enrols over HTTPS, is configured, rotates its certificate and is wiped, on a broker with TLS.

The enrolment server and the gateway are stand-ins with real sockets, real TLS and real signatures.
"""

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio
from cryptography import x509

from agent.configuration import Configuration, ConfigurationStore
from agent.credentials import Credentials, Standing, common_name
from agent.enrolment import Claim, EnrolmentPatience, EnrolmentServer, enrol
from agent.errors import CredentialError, EnrolmentAwayError, EnrolmentError, EnrolmentRefusedError
from agent.fleet import FleetConfig, FleetDevice, run_fleet
from agent.fleet_config import FleetEnrolment
from agent.image import declared_image
from agent.storage import PosixStorage
from firmware.keys import save_public_key
from tests.agent_authority import StandInAuthority, TestCa, serving_est
from tests.agent_standin import Publisher, StandInGateway, StandInJobs
from tests.conftest import free_port, mosquitto_binary, wait_for_port

SERIAL = "SN-000042"
THING = f"thing-{SERIAL}"
IMAGE = declared_image("1.2.0", body=b"\x5a" * 4000)
ROTATE, WIPE = "rotate-certificate", "wipe-credentials"


def start_tls_broker(folder: Path, port: int, open_port: int, ca: Path, files: tuple[Path, Path]) -> "subprocess.Popen[bytes]":
    """A broker that takes devices with a certificate of `ca` on `port`, and the stand-in gateway on `open_port`."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    binary, config = mosquitto_binary(), folder / "broker.conf"
    assert binary is not None
    config.write_text(
        f"per_listener_settings true\nlistener {open_port} 127.0.0.1\nallow_anonymous true\n"
        f"listener {port} 127.0.0.1\ncafile {ca}\ncertfile {files[0]}\nkeyfile {files[1]}\nrequire_certificate true\n"
        "use_identity_as_username true\nallow_anonymous false\n"
        f"acl_file {folder}/acl\n"
    )
    (folder / "acl").write_text(
        "pattern readwrite $aws/things/%u/#\npattern readwrite devices/%u/#\n"
    )
    return subprocess.Popen([binary, "-c", str(config)], **quiet)  # type: ignore[call-overload,no-any-return]
