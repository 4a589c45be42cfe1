"""The steps of a provisioning: check, issue, activate, undo; and a device's later certificates.

What each does is store/provisioning.py's, one transaction each. Those that sign are a class of their own: only workers
that have the CA's key take them (`workflows.options.CA_QUEUE`).
"""

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.serialization import load_pem_public_key
from temporalio import activity

from activities.enrolment_hook import EnrolmentHook
from models.identity import (
    ActivateDeviceInput,
    ActivateDeviceResult,
    CheckEnrolmentInput,
    CheckEnrolmentResult,
    EnrolmentVerdict,
    IssueCertificateInput,
    IssueCertificateResult,
    MarkConfiguredInput,
    RefuseEnrolmentInput,
    ReissueCertificateInput,
    ReissueCertificateResult,
    UndoProvisioningInput,
    UndoProvisioningResult,
)
from pki.keys import check_public_key, spki_sha256
from store.enrolments import ENGINE
from store.provisioning import ProvisioningStore, Signer


@dataclass
class ProvisioningActivities:
    """Collaborators: what is true of enrolments, and who else is asked."""

    store: ProvisioningStore
    hook: EnrolmentHook = field(default_factory=lambda: EnrolmentHook(None))

    @activity.defn
    async def check_enrolment(self, asked: CheckEnrolmentInput) -> CheckEnrolmentResult:
        """Issue, wait for a person, or refuse. Idempotent: states are set, and one that is over is not changed.

        An enrolment that has its certificate already is not asked about again.
        """
        facts = await self.store.check(asked.enrolment_no)
        verdict = facts.verdict
        if verdict.verdict is not EnrolmentVerdict.REFUSE and not facts.issued:
            refused = await self.hook.refusal(facts.serial_number, verdict.batch, facts.spki_sha256)
            if refused:
                verdict = verdict.model_copy(update={"verdict": EnrolmentVerdict.REFUSE, "reason": refused})
        if verdict.verdict is EnrolmentVerdict.REFUSE:
            await self.store.refuse(asked.enrolment_no, ENGINE, verdict.reason)
        elif verdict.verdict is EnrolmentVerdict.WAIT:
            await self.store.wait_for_approval(asked.enrolment_no, verdict.reason)
        return verdict

    @activity.defn
    async def refuse_enrolment(self, asked: RefuseEnrolmentInput) -> None:
        """End an enrolment that has no certificate. Idempotent by its state."""
        await self.store.refuse(asked.enrolment_no, asked.actor, asked.reason)

    @activity.defn
    async def mark_configured(self, asked: MarkConfiguredInput) -> None:
        """The device runs its first configuration. Idempotent: only from `provisioning`."""
        await self.store.mark_configured(asked.device_id)

    @activity.defn
    async def activate_device(self, asked: ActivateDeviceInput) -> ActivateDeviceResult:
        """The device is at work. Idempotent by its status."""
        return await self.store.activate(asked)

    @activity.defn
    async def undo_provisioning(self, asked: UndoProvisioningInput) -> UndoProvisioningResult:
        """Revoke, `error`, failed. Idempotent by the enrolment's state."""
        return await self.store.undo(asked)


@dataclass
class IssuingActivities:
    """Those that sign. Collaborators: the same store, and the CA's key behind a signer."""

    store: ProvisioningStore
    signer: Signer

    @activity.defn
    async def issue_certificate(self, asked: IssueCertificateInput) -> IssueCertificateResult:
        """Certificate, device, configuration and waits in one transaction. Idempotent by the enrolment's state."""
        return await self.store.issue(asked, self.signer)

    @activity.defn
    async def reissue_certificate(self, asked: ReissueCertificateInput) -> ReissueCertificateResult:
        """A device's next certificate. Idempotent by the key: the same key gets the same certificate."""
        key = check_public_key(load_pem_public_key(asked.public_key.encode()))
        return await self.store.reissue(asked, self.signer, spki_sha256(key))
