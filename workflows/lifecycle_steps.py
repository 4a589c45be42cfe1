"""The activities of the lifecycle workflows with their queues, timeouts and summaries.

Only arranges calls; when and in which order is the workflows' business.
"""

from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

from activities.configuration import ConfigurationActivities
from activities.decommission import DecommissionActivities
from activities.diagnostics import DiagnosticActivities
from activities.fleet_rotation import FleetRotationActivities
from activities.rotation import RotationActivities
from activities.shadow import ShadowActivities
from models.diagnostics import (
    AskDeviceInput,
    BootSeen,
    EndedQuestion,
    EndQuestionInput,
    LookAtBootInput,
    OpenedQuestion,
    PublishQuestionInput,
)
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
from workflows import options
from workflows.attributes import show_phase

_SHORT: dict[str, Any] = {
    "start_to_close_timeout": options.SHORT_TIMEOUT,
    "retry_policy": options.SHORT_RETRY,
}


def show(phase: str, details: str, outcome: str | None = None) -> None:
    """The phase, for whoever searches and for the workflow's page."""
    show_phase(phase, outcome)
    workflow.set_current_details(details)


# --- configuration ---------------------------------------------------------------------------------------------------


async def want_configuration(asked: WantConfigurationInput) -> WantedConfiguration:
    """Write what is wanted."""
    return await workflow.execute_activity_method(
        ConfigurationActivities.want_configuration, asked, summary=f"wanted by {asked.actor}"[:100], **_SHORT
    )


async def hint_configuration(asked: HintConfigurationInput) -> ConfigurationSeen:
    """Tell the device, unless it runs it by now."""
    return await workflow.execute_activity_method(
        ConfigurationActivities.hint_configuration,
        asked,
        summary=f"version {asked.version}, unless it runs it",
        **_SHORT,
    )


async def end_configuration(asked: EndConfigurationInput) -> ConfigurationSeen:
    """Wait no longer."""
    return await workflow.execute_activity_method(
        ConfigurationActivities.end_configuration, asked, summary=asked.reason[:100], **_SHORT
    )


# --- shadows ---------------------------------------------------------------------------------------------------------


async def want_shadow(asked: WantShadowInput) -> ShadowSeen:
    """Write what is wanted."""
    return await workflow.execute_activity_method(
        ShadowActivities.want_shadow, asked, summary=f"wanted by {asked.actor}"[:100], **_SHORT
    )


async def check_shadow(asked: CheckShadowInput) -> ShadowSeen:
    """See whether it is reported."""
    return await workflow.execute_activity_method(
        ShadowActivities.check_shadow,
        asked,
        summary="remind, unless it is reported" if asked.remind else "is it reported?",
        **_SHORT,
    )


async def end_shadow(asked: EndShadowInput) -> ShadowSeen:
    """Wait no longer."""
    return await workflow.execute_activity_method(
        ShadowActivities.end_shadow, asked, summary="wait no longer", **_SHORT
    )


# --- diagnostics -----------------------------------------------------------------------------------------------------


async def open_question(asked: AskDeviceInput) -> OpenedQuestion:
    """Write the question."""
    return await workflow.execute_activity_method(
        DiagnosticActivities.open_question, asked, summary=f"{asked.type}, asked by {asked.actor}"[:100], **_SHORT
    )


async def publish_question(asked: PublishQuestionInput, time_number: int) -> None:
    """Tell the device."""
    await workflow.execute_activity_method(
        DiagnosticActivities.publish_question, asked, summary=f"time {time_number}", **_SHORT
    )


async def end_question(asked: EndQuestionInput) -> EndedQuestion:
    """What became of it."""
    return await workflow.execute_activity_method(
        DiagnosticActivities.end_question, asked, summary="what became of it", **_SHORT
    )


async def look_at_boot(asked: LookAtBootInput) -> BootSeen:
    """Whether the device has booted."""
    return await workflow.execute_activity_method(
        DiagnosticActivities.look_at_boot, asked, summary="the last look" if asked.last else "has it booted?", **_SHORT
    )


# --- rotation --------------------------------------------------------------------------------------------------------


async def look_at_certificates(asked: RotateCertificateInput) -> CertificatesSeen:
    """What is to be replaced."""
    return await workflow.execute_activity_method(
        RotationActivities.look_at_certificates, asked, summary=asked.device_id, **_SHORT
    )


async def ask_for_rotation(asked: AskForRotationInput) -> RotationSeen:
    """Ask the device, or only wait for it."""
    return await workflow.execute_activity_method(
        RotationActivities.ask_for_rotation,
        asked,
        summary="ask, or see it answered" if asked.ask else "has it come?",
        **_SHORT,
    )


async def settle_rotation(asked: EndRotationInput) -> EndedRotation:
    """Revoke what is superseded."""
    return await workflow.execute_activity_method(
        RotationActivities.settle_rotation, asked, summary="revoke what is superseded", **_SHORT
    )


async def give_up_rotation(asked: EndRotationInput) -> EndedRotation:
    """It did not come."""
    return await workflow.execute_activity_method(
        RotationActivities.give_up_rotation, asked, summary=asked.reason[:100], **_SHORT
    )


async def revert_rotation(asked: EndRotationInput) -> EndedRotation:
    """It was not seen."""
    return await workflow.execute_activity_method(
        RotationActivities.revert_rotation, asked, summary=asked.reason[:100], **_SHORT
    )


async def rotate_fleet(asked: RotateFleetInput) -> RotateFleetResult:
    """The sweep."""
    return await workflow.execute_activity_method(
        FleetRotationActivities.rotate_fleet,
        asked,
        task_queue=options.DISPATCH_QUEUE,
        start_to_close_timeout=options.SWEEP_TIMEOUT,
        heartbeat_timeout=options.HEARTBEAT_TIMEOUT,
        retry_policy=options.DRIVE_RETRY,
        summary=f"{asked.per_minute} per minute",
    )


# --- decommissioning -------------------------------------------------------------------------------------------------


async def begin_decommission(asked: BeginDecommissionInput) -> BegunDecommission:
    """Out of every rollout."""
    return await workflow.execute_activity_method(
        DecommissionActivities.begin_decommission, asked, summary="stop its executions", **_SHORT
    )


async def stop_flows(asked: StopFlowsInput) -> None:
    """End its other workflows."""
    await workflow.execute_activity_method(
        DecommissionActivities.stop_flows, asked, summary="end its other workflows", **_SHORT
    )


async def ask_to_wipe(asked: AskToWipeInput) -> WipeAsked:
    """Ask the device."""
    return await workflow.execute_activity_method(
        DecommissionActivities.ask_to_wipe, asked, summary=f"until {asked.until:%H:%M:%S} UTC", **_SHORT
    )


async def retire_device(asked: RetireDeviceInput) -> RetiredDevice:
    """The one transaction. Where it waits for a long plan, a second attempt finds that the first has done it."""
    return await workflow.execute_activity_method(
        DecommissionActivities.retire_device,
        asked,
        start_to_close_timeout=options.SHORT_TIMEOUT,
        retry_policy=options.SHORT_RETRY,
        summary="revoke, bar, retire, bury",
    )


async def publish_crls(actor: str) -> bool:
    """Sign revocation lists where a worker can; whether all are. Nothing waits for it: see options.CRL_TIMEOUT."""
    try:
        published: PublishCrlsResult = await workflow.execute_activity(
            options.PUBLISH_CRLS,
            PublishCrlsInput(actor=actor),
            result_type=PublishCrlsResult,
            task_queue=options.CA_QUEUE,
            start_to_close_timeout=options.SIGN_TIMEOUT,
            schedule_to_close_timeout=options.CRL_TIMEOUT,
            retry_policy=options.SHORT_RETRY,
            summary="sign revocation lists",
        )
    except ActivityError as error:
        if is_cancelled_exception(error):
            raise
        workflow.logger.warning("no revocation list was signed, the next hourly one has it: %s", error.cause)
        return False
    return not published.failed


async def await_brokers(asked: AwaitBrokersInput) -> BrokersSeen:
    """Until brokers enforce it, or the time is over."""
    return await workflow.execute_activity_method(
        DecommissionActivities.await_brokers,
        asked,
        task_queue=options.DISPATCH_QUEUE,
        start_to_close_timeout=asked.within + options.BROKERS_GRACE,
        heartbeat_timeout=options.HEARTBEAT_TIMEOUT,
        retry_policy=options.DRIVE_RETRY,
        summary=f"until they enforce revision {asked.revision}",
    )


async def clear_retained(asked: DecommissionDeviceInput) -> int:
    """Clear what brokers keep of its topics; how many. Where no broker answers for long, people are told instead."""
    try:
        cleared: ClearedRetained = await workflow.execute_activity_method(
            DecommissionActivities.clear_retained,
            ClearRetainedInput(device_id=asked.device_id),
            start_to_close_timeout=options.RETAINED_TIMEOUT,
            schedule_to_close_timeout=options.RETAINED_LIMIT,
            retry_policy=options.SHORT_RETRY,
            summary="clear retained messages",
        )
    except ActivityError as error:
        if is_cancelled_exception(error):
            raise
        await workflow.execute_activity_method(
            DecommissionActivities.alert_retained_left, asked, summary=str(error.cause)[:100], **_SHORT
        )
        return 0
    return cleared.topics


async def end_decommission(asked: EndDecommissionInput) -> None:
    """Note that it is over."""
    await workflow.execute_activity_method(
        DecommissionActivities.end_decommission, asked, summary=asked.reason[:100], **_SHORT
    )
