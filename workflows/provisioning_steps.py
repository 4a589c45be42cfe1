"""The activities of a provisioning with their queues, timeouts and summaries: what the workflow calls to have a step done.

Only arranges calls; when and in which order is the workflow's business.
"""

from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.provisioning import IssuingActivities, ProvisioningActivities
from models.identity import (
    ActivateDeviceInput,
    ActivateDeviceResult,
    CheckEnrolmentInput,
    CheckEnrolmentResult,
    IssueCertificateInput,
    IssueCertificateResult,
    MarkConfiguredInput,
    PublishCrlsInput,
    RefuseEnrolmentInput,
    ReissueCertificateInput,
    ReissueCertificateResult,
    UndoProvisioningInput,
)
from workflows import options

_SHORT: dict[str, Any] = {
    "start_to_close_timeout": options.SHORT_TIMEOUT,
    "retry_policy": options.SHORT_RETRY,
}


async def check(asked: CheckEnrolmentInput) -> CheckEnrolmentResult:
    """Ask the batch and the hook."""
    return await workflow.execute_activity_method(
        ProvisioningActivities.check_enrolment,
        asked,
        start_to_close_timeout=options.CHECK_TIMEOUT,
        retry_policy=options.SHORT_RETRY,
        summary="batch, allow-list, hook",
    )


async def refuse(asked: RefuseEnrolmentInput) -> None:
    """No certificate."""
    await workflow.execute_activity_method(
        ProvisioningActivities.refuse_enrolment, asked, summary=asked.reason[:100], **_SHORT
    )


async def issue(asked: IssueCertificateInput) -> IssueCertificateResult:
    """Certificate, device, configuration, waits."""
    return await workflow.execute_activity_method(
        IssuingActivities.issue_certificate,
        asked,
        task_queue=options.CA_QUEUE,
        summary="certificate, device, configuration",
        **_SHORT,
    )


async def mark_configured(asked: MarkConfiguredInput) -> None:
    """Local: one event where a scheduled one costs six, and there is one for each device."""
    await workflow.execute_local_activity_method(
        ProvisioningActivities.mark_configured, asked, summary="configured", **_SHORT
    )


async def activate(asked: ActivateDeviceInput) -> ActivateDeviceResult:
    """The device is at work."""
    return await workflow.execute_activity_method(
        ProvisioningActivities.activate_device, asked, summary=f"{asked.device_id} is at work", **_SHORT
    )


async def undo(asked: UndoProvisioningInput) -> None:
    """Take back what was done, and have the revocation published. That of the brokers does not wait for the list."""
    undone = await workflow.execute_activity_method(
        ProvisioningActivities.undo_provisioning, asked, summary=asked.reason[:100], **_SHORT
    )
    if not undone.revoked:
        return
    try:
        await workflow.execute_activity(
            options.PUBLISH_CRLS,
            PublishCrlsInput(),
            task_queue=options.CA_QUEUE,
            schedule_to_close_timeout=options.CRL_QUEUE_TIMEOUT,
            start_to_close_timeout=options.SHORT_TIMEOUT,
            retry_policy=options.SHORT_RETRY,
            summary="revocation list",
        )
    except ActivityError as error:
        workflow.logger.warning("no new revocation list yet, the hourly one will have it: %s", error.cause)


async def reissue(asked: ReissueCertificateInput) -> ReissueCertificateResult:
    """A device's next certificate."""
    return await workflow.execute_activity_method(
        IssuingActivities.reissue_certificate,
        asked,
        task_queue=options.CA_QUEUE,
        start_to_close_timeout=options.SHORT_TIMEOUT,
        schedule_to_close_timeout=options.REISSUE_TIMEOUT,
        retry_policy=options.SHORT_RETRY,
        summary=f"next certificate of {asked.device_id}",
    )
