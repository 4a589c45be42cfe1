"""A device's next certificate: one step, because whoever takes the request has no key to sign with.

The device has asked with its valid certificate and a new key. What becomes of the two certificates is the rotation's
business (`rotate:<device>`): one that runs has been told in the transaction that issued it, and where none runs, because
the device came by itself, one is started.
"""

from temporalio import workflow
from temporalio.common import SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.workflow import ParentClosePolicy

with workflow.unsafe.imports_passed_through():
    from models.identity import ReissueCertificateInput, ReissueCertificateResult, RotateCertificateInput
    from models.ids import rotate_workflow_id
    from workflows import options
    from workflows import provisioning_steps as steps
    from workflows.rotation import CertificateRotationWorkflow


@workflow.defn
class ReissueCertificateWorkflow:
    """See the module."""

    @workflow.run
    async def run(self, asked: ReissueCertificateInput) -> ReissueCertificateResult:
        """Issue it, or say why not."""
        result = await steps.reissue(asked)
        if not result.refused:
            await _see_it_through(asked.device_id)
        return result


async def _see_it_through(device_id: str) -> None:
    """Start the rotation that ends the overlap of the two certificates, unless one runs."""
    try:
        await workflow.start_child_workflow(
            CertificateRotationWorkflow.run,
            RotateCertificateInput(
                device_id=device_id, actor=f"device:{device_id}", reason="it came by itself", ask=False
            ),
            id=rotate_workflow_id(device_id),
            parent_close_policy=ParentClosePolicy.ABANDON,
            search_attributes=TypedSearchAttributes(
                [
                    SearchAttributePair(options.KIND, options.KIND_ROTATION),
                    SearchAttributePair(options.DEVICE, device_id),
                ]
            ),
            static_summary=f"{device_id} came for its next certificate by itself",
        )
    except WorkflowAlreadyStartedError:
        workflow.logger.debug("a rotation of %s runs already", device_id)
