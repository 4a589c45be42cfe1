"""How programs reach the workflows: connecting, registering search attributes, starting a rollout, schedules.

```python
client = await connect("127.0.0.1:7233")
handle = await start_rollout(client, StartRolloutInput(spec=spec, requested_by="alice"))
result = await handle.result()
```
"""

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from pydantic import BaseModel
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleUpdate,
    ScheduleUpdateInput,
    WorkflowHandle,
)
from temporalio.common import (
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.runtime import Runtime

from models.errors import UnavailableError
from models.health import KeepHistoryInput, SweepOfflineInput
from models.identity import (
    KeepCrlsInput,
    ProvisionDeviceInput,
    ProvisionDeviceResult,
    ReissueCertificateInput,
    ReissueCertificateResult,
    RotateCertificateInput,
)
from models.ids import provision_workflow_id, reissue_workflow_id, rollout_workflow_id, rotate_workflow_id
from models.quantities import format_duration, format_share
from models.rollout import Phase, RolloutResult, StartRolloutInput
from models.spec import RolloutSpec, WaveSpec
from workflows.attributes import found_by
from workflows.offline import OfflineSweepWorkflow
from workflows.options import (
    CATCH_UP,
    CRL_SCHEDULE,
    CRL_UPKEEP_EVERY,
    CRL_UPKEEP_ID,
    KIND_PROVISIONING,
    KIND_REISSUE,
    KIND_ROLLOUT,
    KIND_ROTATION,
    KIND_UPKEEP,
    OFFLINE_CATCH_UP,
    OFFLINE_SCHEDULE,
    OFFLINE_SWEEP_EVERY,
    OFFLINE_SWEEP_ID,
    RETENTION_EVERY,
    RETENTION_ID,
    RETENTION_SCHEDULE,
    ROTATION_WORKFLOW,
    SEARCH_ATTRIBUTES,
    START_TIMEOUT,
    TASK_QUEUE,
)
from workflows.provisioning import ProvisioningWorkflow
from workflows.reissue import ReissueCertificateWorkflow
from workflows.retention import RetentionWorkflow
from workflows.rollout import RolloutWorkflow
from workflows.upkeep import CrlUpkeepWorkflow

MEMO_ENROLMENT = "enrolment_no"
"""In the memo of `provision:<serial>`: which enrolment this run is for."""


async def connect(address: str, namespace: str = "default", *, runtime: Runtime | None = None) -> Client:
    """Connect to Temporal with the data converter that Tidegate's models need.

    Raises UnavailableError naming the address when nobody answers there.
    """
    try:
        return await Client.connect(
            address, namespace=namespace, data_converter=pydantic_data_converter, runtime=runtime
        )
    except RuntimeError as error:
        raise UnavailableError(
            f"cannot connect to Temporal at {address}, namespace {namespace}: {str(error).splitlines()[0]}; "
            "start the stack with 'starter.py up', or check TIDEGATE_TEMPORAL_ADDRESS"
        ) from error


async def register_search_attributes(client: Client) -> list[str]:
    """Add Tidegate's search attributes to the namespace where they are missing. Returns the names added.

    Without them a workflow that sets one would fail its task until somebody adds it. Raises RPCError where the server
    does not let us.
    """
    known = await client.operator_service.list_search_attributes(
        ListSearchAttributesRequest(namespace=client.namespace)
    )
    missing = [key.name for key in SEARCH_ATTRIBUTES if key.name not in known.custom_attributes]
    if missing:
        await add_search_attributes(client, missing)
    return missing


async def add_search_attributes(client: Client, missing: list[str]) -> None:
    """Add keyword attributes by name. Raises RPCError."""
    keyword = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    await client.operator_service.add_search_attributes(
        AddSearchAttributesRequest(namespace=client.namespace, search_attributes=dict.fromkeys(missing, keyword))
    )


async def ensure_schedules(client: Client, crl_lifetime: timedelta | None) -> list[str]:
    """Make Tidegate's schedules, or bring those that exist to what this version wants. Returns the names made.

    What a person did to one, as pausing it, stays. Many workers may do this at once. Raises RPCError.

    Args:
        crl_lifetime: of revocation lists; None where nobody signs, and there is no CA to keep.
    """
    made = []
    for name, schedule in _schedules(crl_lifetime).items():
        try:
            await client.create_schedule(name, schedule, trigger_immediately=True)
            made.append(name)
        except ScheduleAlreadyRunningError:
            await client.get_schedule_handle(name).update(_bring_to(schedule))
    return made


def _schedules(crl_lifetime: timedelta | None) -> dict[str, Schedule]:
    """Every schedule there is, by name."""
    offline = _upkeep(
        OfflineSweepWorkflow.run, SweepOfflineInput(), OFFLINE_SWEEP_ID, "who has fallen silent, who is heard again?"
    )
    retention = _upkeep(
        RetentionWorkflow.run, KeepHistoryInput(), RETENTION_ID, "partitions of the next days, and what is old"
    )
    found = {
        OFFLINE_SCHEDULE: _every(OFFLINE_SWEEP_EVERY, offline, OFFLINE_CATCH_UP),
        RETENTION_SCHEDULE: _every(RETENTION_EVERY, retention),
    }
    if crl_lifetime is not None:
        lists = _upkeep(CrlUpkeepWorkflow.run, KeepCrlsInput(), CRL_UPKEEP_ID, "sign the revocation lists that are due")
        found[CRL_SCHEDULE] = _every(min(CRL_UPKEEP_EVERY, crl_lifetime / 8), lists)
    return found


def _upkeep(run: Any, asked: BaseModel, workflow_id: str, summary: str) -> ScheduleActionStartWorkflow:
    return ScheduleActionStartWorkflow(
        run,
        asked,
        id=workflow_id,
        task_queue=TASK_QUEUE,
        typed_search_attributes=found_by(KIND_UPKEEP),
        static_summary=summary,
    )


def _every(interval: timedelta, action: ScheduleActionStartWorkflow, catch_up: timedelta = CATCH_UP) -> Schedule:
    return Schedule(
        action=action,
        spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=interval)]),
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=catch_up),
    )


def _bring_to(wanted: Schedule) -> Callable[[ScheduleUpdateInput], ScheduleUpdate | None]:
    """None where nothing differs: the server takes the last update it gets, and with it what it says of a pause."""

    def update(found: ScheduleUpdateInput) -> ScheduleUpdate | None:
        known = found.description.schedule
        if _what(known) == _what(wanted):
            return None
        return ScheduleUpdate(dataclasses.replace(wanted, state=known.state))

    return update


def _what(schedule: Schedule) -> tuple[object, ...]:
    """What a version may want otherwise. Inputs are left out: every scheduled workflow takes its defaults."""
    action = schedule.action
    assert isinstance(action, ScheduleActionStartWorkflow)
    every = [interval.every for interval in schedule.spec.intervals]
    return every, schedule.policy.overlap, schedule.policy.catchup_window, action.workflow, action.id, action.task_queue


async def start_rollout(client: Client, request: StartRolloutInput) -> WorkflowHandle[RolloutWorkflow, RolloutResult]:
    """Start a rollout. Its name is the idempotency key.

    Raises temporalio.exceptions.WorkflowAlreadyStartedError while one of this name runs. After it has ended the name
    may be started again: the plan in PostgreSQL decides whether that is a repetition, a continuation or a conflict.
    """
    spec = request.spec
    return await client.start_workflow(
        RolloutWorkflow.run,
        request,
        id=rollout_workflow_id(spec.name),
        task_queue=TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
        search_attributes=search_attributes(spec),
        static_summary=summary(spec),
        static_details=details(spec, request.requested_by),
    )


async def start_provisioning(
    client: Client, request: ProvisionDeviceInput
) -> WorkflowHandle[ProvisioningWorkflow, ProvisionDeviceResult]:
    """Start a serial number's provisioning, or join the one that runs. Raises RPCError where Temporal is away."""
    return await client.start_workflow(
        ProvisioningWorkflow.run,
        request,
        id=provision_workflow_id(request.serial_number),
        task_queue=TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        search_attributes=found_by(KIND_PROVISIONING, device=request.serial_number, phase="checking"),
        memo={MEMO_ENROLMENT: request.enrolment_no},
        static_summary=f"enrolment {request.enrolment_no} of {request.serial_number}",
        rpc_timeout=START_TIMEOUT,
    )


async def start_reissue(
    client: Client, request: ReissueCertificateInput, spki_sha256: str
) -> WorkflowHandle[ReissueCertificateWorkflow, ReissueCertificateResult]:
    """Have a device's next certificate made, or join who does it already. Raises RPCError where Temporal is away."""
    return await client.start_workflow(
        ReissueCertificateWorkflow.run,
        request,
        id=reissue_workflow_id(request.device_id, spki_sha256),
        task_queue=TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        search_attributes=found_by(KIND_REISSUE, device=request.device_id),
        static_summary=f"next certificate of {request.device_id}",
        rpc_timeout=START_TIMEOUT,
    )


async def start_own_rotation(client: Client, device_id: str, overlap: timedelta) -> None:
    """See a rotation to its end that a device has begun by itself, or join the one that runs. Raises RPCError."""
    await client.start_workflow(
        ROTATION_WORKFLOW,
        RotateCertificateInput(device_id=device_id, actor=f"device:{device_id}", ask=False, overlap=overlap),
        id=rotate_workflow_id(device_id),
        task_queue=TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        search_attributes=found_by(KIND_ROTATION, device=device_id),
        static_summary=f"{device_id} came by itself",
        rpc_timeout=START_TIMEOUT,
    )


def search_attributes(spec: RolloutSpec) -> TypedSearchAttributes:
    """What a rollout can be found by from its first moment."""
    return found_by(KIND_ROLLOUT, release=spec.release, phase=str(Phase.PLANNING))


def summary(spec: RolloutSpec) -> str:
    """One line for the list of workflows: `motor-controller@1.3.0 in 3 waves: canary 5%, early 25%, fleet 100%`."""
    waves = ", ".join(f"{wave.name} {_size(wave)}" for wave in spec.waves)
    return f"{spec.release} in {len(spec.waves)} wave{'s' if len(spec.waves) > 1 else ''}: {waves}"[:200]


def details(spec: RolloutSpec, requested_by: str) -> str:
    """The specification as Markdown, for the workflow's page."""
    gate, pace = spec.gate, spec.pace
    soaks = ", ".join(f"{wave.name} {format_duration(wave.soak)}" for wave in spec.waves if wave.soak)
    lines = [
        f"**Release** `{spec.release}`, requested by {requested_by}",
        f"**Target** `{spec.target.model_dump_json(exclude_defaults=True)}`",
        f"**Gate** healthy {format_share(gate.healthy)}, limit {format_share(gate.limit)}, "
        f"false halt {format_share(gate.false_halt)}, missed halt {format_share(gate.missed_halt)}",
        f"**Completion** {format_share(spec.completion)} of a wave must have answered",
        f"**Soak** {soaks or 'none'}",
        f"**Pace** {pace.in_flight} in flight, {pace.per_minute or 'no limit'} per minute",
        f"**Approval** {spec.approval}",
    ]
    return "\n\n".join(lines)


def _size(wave: WaveSpec) -> str:
    return str(wave.size) if isinstance(wave.size, int) else format_share(wave.size)
