"""How programs start NotificationWorkflow."""

from temporalio.client import Client, WorkflowHandle
from temporalio.common import (
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError

from models.alerting import NotifyInput, NotifyResult
from models.ids import notify_workflow_id
from workflows import options
from workflows.attributes import found_by
from workflows.notification import NotificationWorkflow


async def start_notification(client: Client, told: NotifyInput) -> WorkflowHandle[NotificationWorkflow, NotifyResult]:
    """Start `notify:<digest>`; the one there is where that was done before, and has ended perhaps."""
    workflow_id = notify_workflow_id(told.digest)
    try:
        return await client.start_workflow(
            NotificationWorkflow.run,
            told,
            id=workflow_id,
            task_queue=options.TASK_QUEUE,
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            search_attributes=found_by(options.KIND_NOTIFICATION),
            static_summary=told.summary[:200],
        )
    except WorkflowAlreadyStartedError:
        return client.get_workflow_handle_for(NotificationWorkflow.run, workflow_id)
