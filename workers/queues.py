"""Which worker does what: one for each task queue, with its workflows, its activities, and how many at one time.

Three task queues: workflows with short activities; dispatch, for activities that last as long as a wave; artifacts, whose
CPU-bound work runs in processes of its own (activities.delta_builder). A fourth where there are the keys of the
certificate authorities: signing. A fifth where there are channels that alerts are told to.
"""

import os
import socket
from datetime import timedelta
from typing import Any

from temporalio.client import Client
from temporalio.worker import Worker

from activities.artifacts import ArtifactActivities
from activities.authorities import AuthorityActivities, AuthorityWatch
from activities.fleet_jobs import FleetJobActivities
from activities.health import HealthActivities
from activities.notifying import NotifyingActivities
from activities.provisioning import IssuingActivities, ProvisioningActivities
from activities.rollouts import RolloutActivities
from workers.lifecycle import LIFECYCLE_WORKFLOWS, Lifecycle
from workflows import options
from workflows.fleet_job import FleetJobWorkflow
from workflows.notification import NotificationWorkflow
from workflows.offline import OfflineSweepWorkflow
from workflows.provisioning import ProvisioningWorkflow
from workflows.reissue import ReissueCertificateWorkflow
from workflows.retention import RetentionWorkflow
from workflows.rollout import RolloutWorkflow
from workflows.sandbox import runner
from workflows.upkeep import CrlUpkeepWorkflow
from workflows.wave import WaveWorkflow

GRACE = timedelta(seconds=10)
"""Time for activities to end after SIGTERM; drivers end within a beat."""

STICKY = timedelta(seconds=2)
"""How long a workflow's next task waits for the worker that has it in memory before any may take it: after a kill -9
this is the delay. A replay of a few hundred events is cheap."""

BEAT_THROTTLE = timedelta(seconds=2)
"""Heartbeats reach the server at most this often, and with them a driver learns that it was cancelled."""

DRIVERS = 200
"""Waves driven at one time by one worker: each is one coroutine that mostly waits."""

SHORT_ACTIVITIES = 50
BUILDERS = 1
"""Rollouts whose deltas are built at one time: a build takes a core and 17 times the image in memory."""

TELLERS = 20
"""Attempts to tell somebody at one time: each waits for a receiver, and nobody else."""

SIGNERS = 20
"""Activities that sign at one time: each has a transaction open while the signer answers."""

HEALTH_WORKFLOWS: list[type] = [OfflineSweepWorkflow, RetentionWorkflow]


def workers(
    client: Client,
    rollouts: RolloutActivities,
    artifacts: ArtifactActivities,
    watch: AuthorityWatch,
    provisioning: ProvisioningActivities,
    lifecycle: Lifecycle,
    health: HealthActivities,
    jobs: FleetJobActivities,
    authorities: AuthorityActivities | None = None,
    issuing: IssuingActivities | None = None,
    notifying: NotifyingActivities | None = None,
) -> list[Worker]:
    """One worker per task queue; that of the CA only where there are keys, that of notifications where channels are."""
    common: dict[str, Any] = {
        "identity": f"{socket.gethostname()}/{os.getpid()}",
        "graceful_shutdown_timeout": GRACE,
    }
    light = Worker(
        client,
        task_queue=options.TASK_QUEUE,
        workflows=[
            RolloutWorkflow,
            WaveWorkflow,
            FleetJobWorkflow,
            ProvisioningWorkflow,
            ReissueCertificateWorkflow,
            CrlUpkeepWorkflow,
            NotificationWorkflow,
            *LIFECYCLE_WORKFLOWS,
            *HEALTH_WORKFLOWS,
        ],
        activities=[
            rollouts.plan_rollout,
            jobs.plan_fleet_job,
            rollouts.write_plain_document,
            rollouts.close_wave,
            rollouts.check_promotable,
            rollouts.set_job_status,
            rollouts.adjust_pace,
            watch.check_authorities,
            provisioning.check_enrolment,
            provisioning.refuse_enrolment,
            provisioning.mark_configured,
            provisioning.activate_device,
            provisioning.undo_provisioning,
            health.sweep_offline,
            health.keep_history,
            *lifecycle.short,
        ],
        workflow_runner=runner(),
        max_concurrent_activities=SHORT_ACTIVITIES,
        sticky_queue_schedule_to_start_timeout=STICKY,
        **common,
    )
    dispatch = Worker(
        client,
        task_queue=options.DISPATCH_QUEUE,
        activities=[rollouts.drive_wave, rollouts.finish_rollout, rollouts.cancel_running, *lifecycle.lasting],
        max_concurrent_activities=DRIVERS,
        max_heartbeat_throttle_interval=BEAT_THROTTLE,
        **common,
    )
    cpu = Worker(
        client,
        task_queue=options.ARTIFACTS_QUEUE,
        activities=[artifacts.build_delta, artifacts.prepare_artifacts],
        max_concurrent_activities=BUILDERS,
        **common,
    )
    found = [light, dispatch, cpu]
    if authorities is not None and issuing is not None:
        signing = Worker(
            client,
            task_queue=options.CA_QUEUE,
            activities=[authorities.publish_crls, issuing.issue_certificate, issuing.reissue_certificate],
            max_concurrent_activities=SIGNERS,
            **common,
        )
        found.append(signing)
    return found if notifying is None else [*found, notify_worker(client, notifying, **common)]


def notify_worker(client: Client, notifying: NotifyingActivities, **common: Any) -> Worker:
    """Tells people of alerts."""
    return Worker(
        client,
        task_queue=options.NOTIFY_QUEUE,
        activities=[notifying.choose_channels, notifying.deliver_notification],
        max_concurrent_activities=TELLERS,
        **common,
    )
