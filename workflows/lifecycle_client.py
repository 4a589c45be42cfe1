"""How programs reach the lifecycle workflows: starting, joining and ending them, and the schedule of rotation.

```python
handle = await start_configuration(client, ConfigureDeviceInput(device_id="motor-7", config={...}, actor="alice"))
result = await handle.result()
```

Whether a device may be dealt with so is asked before (store.lifecycle.LifecycleStore.check), and again by the workflow.
"""

from dataclasses import dataclass
from datetime import timedelta

from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    WorkflowHandle,
)
from temporalio.common import (
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from models.diagnostics import AskDeviceInput, AskDeviceResult
from models.identity import (
    ConfigureDeviceInput,
    ConfigureDeviceResult,
    DecommissionDeviceInput,
    DecommissionDeviceResult,
    RotateCertificateInput,
    RotateCertificateResult,
)
from models.ids import (
    FLEET_ROTATION,
    configure_workflow_id,
    decommission_workflow_id,
    rotate_workflow_id,
)
from models.lifecycle import RotateFleetInput, RotateFleetResult
from workflows import options
from workflows.answers import said_by
from workflows.attributes import found_by
from workflows.configuration import ConfigurationWorkflow
from workflows.decommission import DecommissionWorkflow
from workflows.diagnostic import DiagnosticWorkflow
from workflows.fleet_rotation import FleetRotationWorkflow
from workflows.rotation import CertificateRotationWorkflow

ROTATION_SCHEDULE = "tidegate-rotation"
SWEEP_EVERY = timedelta(hours=1)
"""Certificates live for weeks; an hour is soon enough."""


async def start_configuration(
    client: Client, asked: ConfigureDeviceInput
) -> WorkflowHandle[ConfigurationWorkflow, ConfigureDeviceResult]:
    """Start `configure:<device>`, or have the running one want this instead."""
    return await client.start_workflow(
        ConfigurationWorkflow.run,
        asked,
        id=configure_workflow_id(asked.device_id),
        task_queue=options.TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        start_signal=options.CONFIGURE,
        start_signal_args=[asked],
        search_attributes=found_by(options.KIND_CONFIGURATION, device=asked.device_id),
        static_summary=f"configuration of {asked.device_id}, {said_by('asked', asked.actor, asked.reason)}"[:200],
    )


async def start_rotation(
    client: Client, asked: RotateCertificateInput
) -> WorkflowHandle[CertificateRotationWorkflow, RotateCertificateResult]:
    """Start `rotate:<device>`. Raises WorkflowAlreadyStartedError while one runs."""
    return await client.start_workflow(
        CertificateRotationWorkflow.run,
        asked,
        id=rotate_workflow_id(asked.device_id),
        task_queue=options.TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
        search_attributes=found_by(options.KIND_ROTATION, device=asked.device_id),
        static_summary=f"new certificate for {asked.device_id}, {said_by('asked', asked.actor, asked.reason)}"[:200],
    )


async def start_decommission(
    client: Client, asked: DecommissionDeviceInput
) -> WorkflowHandle[DecommissionWorkflow, DecommissionDeviceResult]:
    """Start `decommission:<device>`. Raises WorkflowAlreadyStartedError while one runs."""
    return await client.start_workflow(
        DecommissionWorkflow.run,
        asked,
        id=decommission_workflow_id(asked.device_id),
        task_queue=options.TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
        search_attributes=found_by(options.KIND_DECOMMISSION, device=asked.device_id),
        static_summary=f"end of {asked.device_id}, {said_by('asked', asked.actor, asked.reason)}"[:200],
    )


async def start_diagnosis(client: Client, asked: AskDeviceInput) -> WorkflowHandle[DiagnosticWorkflow, AskDeviceResult]:
    """Start `diagnose:<device>/<request>`. Raises WorkflowAlreadyStartedError where this question was asked before."""
    return await client.start_workflow(
        DiagnosticWorkflow.run,
        asked,
        id=asked.workflow_id,
        task_queue=options.TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
        search_attributes=found_by(options.KIND_DIAGNOSTIC, device=asked.device_id),
        static_summary=f"{asked.type} of {asked.device_id}, {said_by('asked', asked.actor, asked.reason)}"[:200],
        rpc_timeout=options.START_TIMEOUT,
    )


async def start_fleet_rotation(
    client: Client, asked: RotateFleetInput
) -> WorkflowHandle[FleetRotationWorkflow, RotateFleetResult]:
    """Start a sweep, beside those of the schedule. Raises WorkflowAlreadyStartedError while one runs."""
    return await client.start_workflow(
        FleetRotationWorkflow.run,
        asked,
        id=FLEET_ROTATION,
        task_queue=options.TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
        search_attributes=found_by(options.KIND_UPKEEP),
        static_summary=f"rotation of certificates, asked by {asked.actor}"[:200],
    )


async def ensure_rotation_schedule(client: Client, asked: RotateFleetInput) -> bool:
    """The schedule of sweeps, made where it is missing; one that exists stays as somebody may have changed it.

    Returns whether it was made.
    """
    action = ScheduleActionStartWorkflow(
        FleetRotationWorkflow.run,
        asked,
        id=ROTATION_SCHEDULE,
        task_queue=options.TASK_QUEUE,
        typed_search_attributes=found_by(options.KIND_UPKEEP),
        static_summary="rotation of certificates that are due",
    )
    schedule = Schedule(
        action=action,
        spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=SWEEP_EVERY)], jitter=timedelta(minutes=5)),
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=options.CATCH_UP),
    )
    try:
        await client.create_schedule(ROTATION_SCHEDULE, schedule)
    except ScheduleAlreadyRunningError:
        return False
    return True


async def trigger_crl_upkeep(client: Client) -> None:
    """Have the revocation lists that are due signed now. Raises RPCError NOT_FOUND where no schedule does it."""
    await client.get_schedule_handle(options.CRL_SCHEDULE).trigger()


@dataclass
class TemporalFlows:
    """activities.lifecycle.DeviceFlows on Temporal."""

    client: Client

    async def start_rotation(self, asked: RotateCertificateInput, /) -> bool:
        """Start `rotate:<device>`; False: one runs already."""
        try:
            await start_rotation(self.client, asked)
        except WorkflowAlreadyStartedError:
            return False
        return True

    async def start_diagnosis(self, asked: AskDeviceInput, /) -> bool:
        """Start `diagnose:<device>/<request>`; False: it was asked before."""
        try:
            await start_diagnosis(self.client, asked)
        except WorkflowAlreadyStartedError:
            return False
        return True

    async def end(self, workflow_id: str, reason: str, /) -> bool:
        """Terminate; False: none ran."""
        try:
            await self.client.get_workflow_handle(workflow_id).terminate(reason=reason)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            return False
        return True
