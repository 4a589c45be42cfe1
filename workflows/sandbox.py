"""The sandbox that workflows run in, in production and in every test.

Data (`models`), activities' signatures and third parties are passed through: importing them anew for each workflow
would cost a second of CPU. `domain` is imported anew, so that a decision which asks the clock or rolls dice fails
loudly; such imports stand in `with decisions()`, and any other that is not passed through on purpose is an error.
"""

from contextlib import AbstractContextManager

from temporalio import workflow
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions
from temporalio.workflow import SandboxImportNotificationPolicy as Policy

PASSED_THROUGH = (
    "models",
    "activities",
    "workflows.answers",
    "workflows.attributes",
    "workflows.options",
    "workflows.steps",
    "workflows.job_steps",
    "workflows.lifecycle_steps",
    "workflows.provisioning_steps",
    "workflows.sandbox",
    "orjson",
    "structlog",
    "prometheus_client",
    "cryptography",
    "securesystemslib",
)


def runner() -> SandboxedWorkflowRunner:
    """The workflow runner of every worker, test and replay."""
    restrictions = SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH)
    return SandboxedWorkflowRunner(
        restrictions=restrictions.with_import_notification_policy(
            Policy.RAISE_ON_UNINTENTIONAL_PASSTHROUGH | Policy.WARN_ON_DYNAMIC_IMPORT
        )
    )


def decisions() -> AbstractContextManager[None]:
    """Around imports of modules that the sandbox is to import anew: `domain`, and what only arranges its answers."""
    return workflow.unsafe.sandbox_import_notification_policy(Policy.SILENT)
