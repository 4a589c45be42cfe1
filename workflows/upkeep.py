"""Upkeep of revocation lists: one round, started by the schedule `tidegate-crl`.

Sign what is due, where the keys are; then look, where no keys are needed, whether lists are being renewed and
authorities last. The second step is done whatever became of the first: that nobody signs is what it is there to notice.
"""

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from activities.authorities import AuthorityActivities, AuthorityWatch
    from models.identity import (
        CheckAuthoritiesInput,
        KeepCrlsInput,
        KeepCrlsResult,
        PublishCrlsInput,
        PublishCrlsResult,
    )
    from workflows import options


@workflow.defn
class CrlUpkeepWorkflow:
    """See the module."""

    @workflow.run
    async def run(self, asked: KeepCrlsInput) -> KeepCrlsResult:
        """Sign, then look."""
        published, trouble = await self._publish()
        checked = await workflow.execute_activity_method(
            AuthorityWatch.check_authorities,
            CheckAuthoritiesInput(),
            start_to_close_timeout=options.SHORT_TIMEOUT,
            retry_policy=options.SHORT_RETRY,
            summary="are lists renewed, do authorities last?",
        )
        reason = trouble or _in_words(published)
        workflow.set_current_details("\n\n".join([reason, *(f"**Alert** {text}" for text in checked.alerts)]))
        return KeepCrlsResult(reason=reason, signed=published.signed, alerts=checked.alerts)

    async def _publish(self) -> tuple[PublishCrlsResult, str]:
        """What was signed, and why nothing was where nobody could be had who signs."""
        try:
            published = await workflow.execute_activity_method(
                AuthorityActivities.publish_crls,
                PublishCrlsInput(),
                task_queue=options.CA_QUEUE,
                schedule_to_close_timeout=options.CRL_UPKEEP_LIMIT,
                start_to_close_timeout=options.SIGN_TIMEOUT,
                retry_policy=options.SHORT_RETRY,
                summary="sign the lists that are due",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            return PublishCrlsResult(), f"no list could be signed: {error.cause or error}"
        return published, ""


def _in_words(published: PublishCrlsResult) -> str:
    """`signed list 8 of ... (2 certificates revoked since list 7); 1 stands`."""
    parts = [f"signed list {one.number} of {one.name} ({one.reason})" for one in published.signed]
    parts += [f"could not sign: {text}" for text in published.failed]
    return "; ".join([*parts, f"{published.standing} stand{'s' if published.standing == 1 else ''}"])
