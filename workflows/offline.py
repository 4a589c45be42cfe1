"""Who is offline: one look, started by the schedule `tidegate-offline` every minute.

The look itself is one transaction (activities/health.py). A look that fails is not repeated for long: the next one is
due within the minute, and does the same.
"""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.health import HealthActivities
    from models.health import SweepOfflineInput, SweepOfflineResult
    from workflows import options


@workflow.defn
class OfflineSweepWorkflow:
    """See the module."""

    @workflow.run
    async def run(self, asked: SweepOfflineInput) -> SweepOfflineResult:
        """Look."""
        result = await workflow.execute_activity_method(
            HealthActivities.sweep_offline,
            asked,
            start_to_close_timeout=options.SHORT_TIMEOUT,
            schedule_to_close_timeout=options.OFFLINE_SWEEP_LIMIT,
            retry_policy=options.SHORT_RETRY,
            summary="who has fallen silent, who is heard again?",
        )
        workflow.set_current_details("\n\n".join([result.reason, *(f"**Alert** {text}" for text in result.alerts)]))
        return result
