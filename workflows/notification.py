"""Telling people of alerts: one notification to every channel that wants it, each for itself and for up to a day.

`notify:<digest>`. A channel that does not take it is tried again, ever more rarely, and holds up no other. What became of
it is the result. Addresses and secrets are the worker's; here are names of channels.
"""

import asyncio

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.notifying import NotifyingActivities
    from models.alerting import DeliverInput, Delivery, NotifyInput, NotifyResult
    from workflows import options
    from workflows.attributes import show_phase


@workflow.defn
class NotificationWorkflow:
    """See the module."""

    @workflow.run
    async def run(self, told: NotifyInput) -> NotifyResult:
        """Ask which channels, and tell them all at once."""
        try:
            chosen = await workflow.execute_activity_method(
                NotifyingActivities.choose_channels,
                told,
                task_queue=options.NOTIFY_QUEUE,
                start_to_close_timeout=options.SHORT_TIMEOUT,
                schedule_to_close_timeout=options.TEST_LIMIT if told.channel else options.NOTIFY_LIMIT,
                retry_policy=options.NOTIFY_RETRY,
                summary="which channels want it?",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            return self._ended(told, [], f"no channel could be asked: {_why(error)}")
        deliveries = await asyncio.gather(*(self._deliver(name, told) for name in chosen.names))
        return self._ended(told, list(deliveries), "" if deliveries else "no channel wants it")

    async def _deliver(self, channel: str, told: NotifyInput) -> Delivery:
        try:
            return await workflow.execute_activity_method(
                NotifyingActivities.deliver_notification,
                DeliverInput(channel=channel, notification=told),
                task_queue=options.NOTIFY_QUEUE,
                start_to_close_timeout=options.NOTIFY_TIMEOUT,
                schedule_to_close_timeout=options.TEST_LIMIT if told.channel else options.NOTIFY_LIMIT,
                retry_policy=options.NOTIFY_RETRY,
                summary=f"tell {channel}",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            return Delivery(channel=channel, delivered=False, reason=_why(error))

    def _ended(self, told: NotifyInput, deliveries: list[Delivery], reason: str) -> NotifyResult:
        failed = [each for each in deliveries if not each.delivered]
        outcome = (
            "nobody" if not deliveries else "told" if not failed else "failed" if failed == deliveries else "partly"
        )
        show_phase("done", outcome)
        lines = [f"- {each.channel}: {'told' if each.delivered else each.reason}" for each in deliveries]
        workflow.set_current_details("\n".join([f"**{told.severity}** {told.summary}", "", *(lines or [reason])]))
        return NotifyResult(digest=told.digest, deliveries=tuple(deliveries), reason=reason)


def _why(error: ActivityError) -> str:
    return str(error.cause or error)
