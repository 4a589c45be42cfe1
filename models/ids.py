"""Names and identifiers, their builders and their inverses.

Workflow ids read like paths and are the idempotency keys. A rollout's name has no underscore, so that its job id on
the wire (AWS IoT allows no dot there) can be turned back into it.

>>> wave_workflow_id("motor-1.3.0", 2)
'rollout:motor-1.3.0/wave:2'
>>> rollout_job_id("motor-1.3.0"), rollout_of_job("motor-1_3_0")
('motor-1_3_0', 'motor-1.3.0')
"""

import re

from models.errors import InvalidInputError

THING_NAME = re.compile(r"[a-zA-Z0-9:_-]{1,128}")
JOB_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ROLLOUT_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.-]{0,63}")
JOB_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.-]{0,62}")
"""A fleet job's: one shorter than a rollout's, for the mark that its job id begins with."""
SHADOW_NAME = re.compile(r"[$a-zA-Z0-9:_-]{1,64}")
RULE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
PRODUCT_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
VERSION = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.+_-]{0,49}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SERIAL_NUMBER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9:._-]{0,63}")
"""A serial number that can be enrolled; the registry holds others too. 64 characters: X.520's bound."""
MAX_COMMON_NAME_CHARS = 64
"""X.520's bound: a longer device id cannot stand in a certificate."""
BATCH_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,57}")
"""58 characters: with `claim.` before it, it has to stand in a certificate."""
ENGINE_PREFIX, CLAIM_PREFIX = "engine.", "claim."
"""How common names of services and of claim certificates begin. No thing name has a dot, so no device can bear one."""


def rollout_workflow_id(name: str) -> str:
    """Workflow id of a rollout: `rollout:<name>`."""
    return f"rollout:{name}"


def rollout_of_workflow(workflow_id: str) -> str:
    """Inverse of `rollout_workflow_id`, also for a wave's id. Raises InvalidInputError for any other id."""
    match = re.fullmatch(r"rollout:([^/]+)(?:/wave:\d+)?", workflow_id)
    if match is None:
        raise InvalidInputError(f"not a rollout's workflow id: {workflow_id!r}, expected 'rollout:<name>'")
    return match[1]


def wave_workflow_id(name: str, wave: int) -> str:
    """Workflow id of wave number `wave` (from 1) of a rollout: `rollout:<name>/wave:<n>`."""
    return f"rollout:{name}/wave:{wave}"


def rollout_job_id(name: str) -> str:
    """The job id that devices see for a rollout."""
    return name.replace(".", "_")


def rollout_of_job(job_id: str) -> str:
    """Inverse of `rollout_job_id`."""
    return job_id.replace("_", ".")


def fleet_job_id(name: str) -> str:
    """The job id that devices see for a fleet job. No rollout's begins with an underscore.

    >>> fleet_job_id("restart-berlin.2")
    '_restart-berlin_2'
    """
    return "_" + name.replace(".", "_")


def fleet_job_workflow_id(name: str) -> str:
    """Workflow id of a fleet job: `job:<name>`."""
    return f"job:{name}"


def fleet_job_wave_workflow_id(name: str, wave: int) -> str:
    """Workflow id of wave number `wave` (from 1) of a fleet job: `job:<name>/wave:<n>`."""
    return f"job:{name}/wave:{wave}"


_RUN_OF_SCHEDULE = re.compile(r"job:(.+)-(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)Z")
_JOB_OF_SCHEDULE = re.compile(r"(.+)-(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)")
MAX_SCHEDULE_NAME_CHARS = 47
"""Of a job's 63: a run's name has the time behind it."""


def job_schedule_id(name: str) -> str:
    """Id of a schedule of jobs: `job-schedule:<name>`."""
    return f"job-schedule:{name}"


def scheduled_job_name(workflow_id: str) -> str | None:
    """The name of a schedule's run, from the id that Temporal gives its workflow; None for any other id.

    >>> scheduled_job_name("job:nightly-2026-11-30T02:00:00Z")
    'nightly-20261130T020000'
    """
    found = _RUN_OF_SCHEDULE.fullmatch(workflow_id)
    return "{}-{}{}{}T{}{}{}".format(*found.groups()) if found else None


def scheduled_workflow_id(name: str) -> str:
    """Inverse of `scheduled_job_name`; a name that is none of a schedule's run is a job's like any other.

    >>> scheduled_workflow_id("nightly-20261130T020000")
    'job:nightly-2026-11-30T02:00:00Z'
    """
    found = _JOB_OF_SCHEDULE.fullmatch(name)
    return "job:{}-{}-{}-{}T{}:{}:{}Z".format(*found.groups()) if found else fleet_job_workflow_id(name)


def diagnose_workflow_id(device_id: str, request_id: str) -> str:
    """Workflow id of one question to a device: `diagnose:<device>/<request>`."""
    return f"diagnose:{device_id}/{request_id}"


def shadow_workflow_id(device_id: str, shadow: str, token: str) -> str:
    """Workflow id of one wait for a device to report what is wanted: `shadow:<device>/<shadow>/<token>`."""
    return f"shadow:{device_id}/{shadow}/{token}"


def notify_workflow_id(digest: str) -> str:
    """Workflow id of one notification of alerts: `notify:<digest>`."""
    return f"notify:{digest}"


def parse_release_ref(ref: str) -> tuple[str, str]:
    """Split `product@version`; raises InvalidInputError naming what is wrong."""
    product, at, version = ref.partition("@")
    if not at or not PRODUCT_NAME.fullmatch(product) or not VERSION.fullmatch(version):
        raise InvalidInputError(f"not a release: {ref!r}, expected product@version, as in motor-controller@1.3.0")
    return product, version


def provision_workflow_id(serial_number: str) -> str:
    """Workflow id of a serial number's enrolment: `provision:<serial>`."""
    return f"provision:{serial_number}"


def configure_workflow_id(device_id: str) -> str:
    """Workflow id of a device's configuration: `configure:<device>`."""
    return f"configure:{device_id}"


def rotate_workflow_id(device_id: str) -> str:
    """Workflow id of the rotation of a device's certificate: `rotate:<device>`."""
    return f"rotate:{device_id}"


def reissue_workflow_id(device_id: str, spki_sha256: str) -> str:
    """Workflow id of the issue of a device's next certificate, for one key: `reissue:<device>/<key>`."""
    return f"reissue:{device_id}/{spki_sha256[:16]}"


def decommission_workflow_id(device_id: str) -> str:
    """Workflow id of a device's decommissioning: `decommission:<device>`."""
    return f"decommission:{device_id}"


FLEET_ROTATION = "rotation"
"""Workflow id of a sweep that a person started; those of the schedule have the time behind the schedule's name."""


def subject_of_workflow(workflow_id: str) -> tuple[str, str]:
    """Inverse of the four above: (`provision`, serial) or (`configure` | `rotate` | `decommission`, device).

    Raises InvalidInputError for any other id.

    >>> subject_of_workflow("rotate:motor-7")
    ('rotate', 'motor-7')
    """
    kind, colon, subject = workflow_id.partition(":")
    if not colon or not subject or kind not in ("provision", "configure", "rotate", "decommission"):
        raise InvalidInputError(f"not the id of a lifecycle workflow: {workflow_id!r}, expected 'provision:<serial>'")
    return kind, subject
