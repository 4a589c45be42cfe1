"""A device's next certificate: one step, because whoever takes the request has no key to sign with.

The device has asked with its valid certificate and a new key. That it is told of, and what becomes of the old
certificate, is the rotation's business.
"""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from models.identity import ReissueCertificateInput, ReissueCertificateResult
    from workflows import provisioning_steps as steps


@workflow.defn
class ReissueCertificateWorkflow:
    """See the module."""

    @workflow.run
    async def run(self, asked: ReissueCertificateInput) -> ReissueCertificateResult:
        """Issue it, or say why not."""
        return await steps.reissue(asked)
