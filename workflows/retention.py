"""How long things are kept: one round, started by the schedule `tidegate-retention` every hour and with the worker.

Makes the partitions of the next days and drops those that are old (activities/health.py); a round that is missed is made
up for by the next, days before anything lacks a partition.
"""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.health import HealthActivities
    from models.health import KeepHistoryInput, KeepHistoryResult
    from workflows import options


@workflow.defn
class RetentionWorkflow:
    """See the module."""

    @workflow.run
    async def run(self, asked: KeepHistoryInput) -> KeepHistoryResult:
        """Make room, and let go."""
        result = await workflow.execute_activity_method(
            HealthActivities.keep_history,
            asked,
            start_to_close_timeout=options.RETENTION_TIMEOUT,
            schedule_to_close_timeout=options.RETENTION_LIMIT,
            retry_policy=options.SHORT_RETRY,
            summary="partitions of the next days, and what is old",
        )
        workflow.set_current_details(result.reason)
        return result
