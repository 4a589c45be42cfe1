"""Task queues, timeouts, retry policies, names and search attributes: every number and name that workflows use.

Each constant says why it has its value. Workflows and the worker import from here; nothing here does anything.
"""

from datetime import timedelta

from temporalio.common import RetryPolicy, SearchAttributeKey

# --- task queues -----------------------------------------------------------------------------------------------------

TASK_QUEUE = "tidegate"
"""Workflows, and activities of one short transaction."""

DISPATCH_QUEUE = "tidegate-dispatch"
"""Activities that last as long as a wave: they would take the slots of the short ones."""

ARTIFACTS_QUEUE = "tidegate-artifacts"
"""CPU-bound work (deltas): few at a time, and best on machines of its own."""

CA_QUEUE = "tidegate-ca"
"""Activities that sign certificates and revocation lists: only workers that have the CA's key take from it."""

NOTIFY_QUEUE = "tidegate-notify"
"""Activities that tell people: only workers that have the notify file, with its secrets, take from it."""

# --- activities of other modules, by name -----------------------------------------------------------------------------

PUBLISH_CRLS = "publish_crls"
"""activities.authorities.AuthorityActivities, on CA_QUEUE; by name, so that no workflow imports what signs."""

PREPARE_ARTIFACTS = "prepare_artifacts"
"""activities.artifacts.ArtifactActivities; by name, because a workflow has no use for a delta codec's imports."""

ROTATION_WORKFLOW = "CertificateRotationWorkflow"
"""workflows.rotation; by name, because who starts it where a device came by itself has no use for more."""

# --- signals ---------------------------------------------------------------------------------------------------------

WAVE_SOAKING = "wave_soaking"
"""From a wave to whoever started it; by name, because the wave does not know what kind of workflow that is."""

CONFIGURE = "configure"
"""To a device's ConfigurationWorkflow: a models.identity.ConfigureDeviceInput that replaces what is waited for."""

DEVICE_EVENT = "device_event"
"""To every lifecycle workflow: a models.identity.DeviceEvent, delivered from the outbox (store/waits.py)."""

# --- retries ---------------------------------------------------------------------------------------------------------

NEVER_MENDED = ["InvalidInputError", "SpecError", "NotFoundError", "ConflictError", "RefusedError", "VerificationError"]
"""Errors (models.errors) that the same request meets again however often it is repeated."""

SHORT_RETRY = RetryPolicy(
    initial_interval=timedelta(milliseconds=500),
    maximum_interval=timedelta(seconds=30),
    non_retryable_error_types=NEVER_MENDED,
)
"""Until it succeeds: a database that is down comes back, and a rollout that gives up helps nobody."""

DRIVE_RETRY = RetryPolicy(
    initial_interval=timedelta(milliseconds=500),
    maximum_interval=timedelta(seconds=5),
    non_retryable_error_types=NEVER_MENDED,
)
"""As SHORT_RETRY; a cap of 5 s, because attempts of an activity that lasts for weeks add up with every deployment, and
the backoff with them."""

ARTIFACTS_RETRY = RetryPolicy(
    initial_interval=timedelta(seconds=1),
    maximum_interval=timedelta(seconds=30),
    maximum_attempts=5,
    non_retryable_error_types=NEVER_MENDED,
)
"""Few attempts: the full image is always there, so a delta is not worth a long wait."""

NOTIFY_RETRY = RetryPolicy(
    initial_interval=timedelta(seconds=5),
    maximum_interval=timedelta(minutes=10),
    non_retryable_error_types=NEVER_MENDED,
)
"""A receiver that is away for a minute hears soon after; one that is away for the night is asked 150 times."""

# --- reminders: a hint that nobody hears is sent again, ever more rarely -----------------------------------------------

FIRST_REMINDER = timedelta(seconds=30)
"""A device that is there answers within seconds; what was lost on the way is sent again soon."""

RAREST_REMINDER = timedelta(hours=6)
"""A device that has been away for a day asks by itself when it comes back; reminders are for hints that got lost."""

FIRST_WIPE_REMINDER = timedelta(seconds=10)
RAREST_WIPE_REMINDER = timedelta(minutes=2)
"""A decommissioning waits for minutes, not for days."""

FIRST_SHADOW_REMINDER = timedelta(seconds=5)
"""Somebody waits, and what was lost on the way is sent again at once; then ever more rarely."""

SHADOW_REST = timedelta(seconds=1)
"""Between two looks at a device that reports something else all the time."""
QUESTION_REPEATS = 2
"""How often a diagnostic request is sent again within its time: devices know it by its id, and answer once."""

BOOT_LOOK = timedelta(seconds=20)
"""Between two looks at whether a device has booted, where no heartbeat tells: one that came in the moment of the wait's
own beginning does not."""

# --- timeouts --------------------------------------------------------------------------------------------------------

SHORT_TIMEOUT = timedelta(seconds=30)
"""One transaction; ten times what the slowest takes."""

PLAN_TIMEOUT = timedelta(minutes=10)
"""One INSERT ... SELECT over the fleet: a million devices take about a minute."""

DRIVE_TIMEOUT = timedelta(days=365)
"""A wave lasts as long as its slowest device's deadlines allow; liveness is the heartbeat's business."""

HEARTBEAT_TIMEOUT = timedelta(seconds=10)
"""How long a worker that was killed goes unnoticed. Drivers beat every second."""

ARTIFACTS_TIMEOUT = timedelta(minutes=30)
"""All attempts together. The largest delta of a 16 MiB image takes about a minute."""

ARTIFACTS_QUEUE_TIMEOUT = timedelta(minutes=5)
"""How long a rollout waits for a worker of ARTIFACTS_QUEUE before it goes on with full images."""

ARTIFACTS_HEARTBEAT = timedelta(seconds=30)
"""Preparing artifacts beats every 5 s."""

SWEEP_TIMEOUT = timedelta(days=7)
"""A fleet-wide rotation at a pace; liveness is the heartbeat's business. Longer ones are taken up by the next sweep."""

CRL_TIMEOUT = timedelta(minutes=5)
"""How long a lifecycle workflow waits for a worker that signs revocation lists. The engine and the brokers' ACL act on
a revocation without one, and the hourly upkeep signs what was missed."""

RETAINED_TIMEOUT = timedelta(minutes=1)
"""A connection to the broker, a few seconds of listening."""

RETAINED_LIMIT = timedelta(minutes=30)
"""All attempts to clear retained messages together; a broker that is away for longer is told of in an alert."""

BROKERS_GRACE = timedelta(minutes=1)
"""Beyond what a decommissioning grants the brokers: for a worker that dies meanwhile."""

CHECK_TIMEOUT = timedelta(seconds=20)
"""One transaction, and the enrolment hook, which has five seconds."""

START_TIMEOUT = timedelta(seconds=5)
"""Of a call that starts a workflow for a device that waits: it would rather be told to come again."""

REISSUE_TIMEOUT = timedelta(minutes=2)
"""All attempts together: the device waits for the answer, and asks again."""

CRL_QUEUE_TIMEOUT = timedelta(minutes=2)
"""How long a provisioning that was undone waits for a revocation list; after that the hourly one has it."""

SIGN_TIMEOUT = timedelta(minutes=2)
"""One attempt at the revocation lists: 100,000 entries take about two seconds, a slow signer's round trips the rest."""

CRL_UPKEEP_LIMIT = timedelta(minutes=10)
"""How long a round waits for somebody who signs before it looks whether an alert is due; the next round is within the
hour, and a list has days to live."""

NOTIFY_TIMEOUT = timedelta(minutes=1)
"""One attempt, which has 20 seconds, and a thread that may be waited for."""

NOTIFY_LIMIT = timedelta(days=1)
"""All attempts at one channel together. Who was not reached in a day looks at 'alert list'."""

TEST_LIMIT = timedelta(minutes=1)
"""The same of a test, for which a person waits."""

# --- schedules ---------------------------------------------------------------------------------------------------------

CRL_SCHEDULE = "tidegate-crl"
CRL_UPKEEP_ID = "upkeep:crl"
"""Temporal adds the time to the id of each round."""

CRL_UPKEEP_EVERY = timedelta(hours=1)
"""Long before anything is due: lists are renewed at a quarter of their life, which is a day or more. Shorter lists are
looked at eight times in theirs."""

OFFLINE_SCHEDULE = "tidegate-offline"
OFFLINE_SWEEP_ID = "health:offline"
OFFLINE_SWEEP_EVERY = timedelta(minutes=1)
"""A device is found offline a minute after its limit at the latest; the least useful limit is a few minutes."""

OFFLINE_SWEEP_LIMIT = timedelta(minutes=5)
"""All attempts of one look together: PostgreSQL is away for longer now and then, and later looks do the same."""

OFFLINE_CATCH_UP = timedelta(minutes=1)
"""A look that was missed says nothing that the next does not."""

RETENTION_SCHEDULE = "tidegate-retention"
RETENTION_ID = "health:retention"
RETENTION_EVERY = timedelta(hours=1)
"""Partitions are made three days ahead and dropped by the day; an hour keeps what is deleted row by row small."""

RETENTION_TIMEOUT = timedelta(minutes=20)
"""One attempt: rows of a day without a partition move at some 50,000 a second."""

RETENTION_LIMIT = timedelta(minutes=50)
"""All attempts together: less than the time between two rounds."""

CATCH_UP = timedelta(minutes=5)
"""A round that was missed is not made up for: the next one does the same. Temporal's default is a year."""

JOB_CATCH_UP = timedelta(minutes=10)
"""A job that was missed while Temporal was away is made up for within this; later it would come at a time that nobody
has chosen."""

AT_ONCE = timedelta(0)
"""A time that is not later than this ahead has come."""

# --- what a person sees ------------------------------------------------------------------------------------------------

KIND_ROLLOUT = "rollout"
KIND_WAVE = "wave"
KIND_PROVISIONING = "provisioning"
KIND_REISSUE = "reissue"
KIND_CONFIGURATION = "configuration"
KIND_ROTATION = "rotation"
KIND_DECOMMISSION = "decommission"
KIND_UPKEEP = "upkeep"
KIND_JOB = "job"
JOB_SCHEDULE = "job-schedule"
"""Kind of a schedule of jobs."""
KIND_SHADOW = "shadow"
KIND_DIAGNOSTIC = "diagnostic"
KIND_NOTIFICATION = "notification"

KIND = SearchAttributeKey.for_keyword("TidegateKind")
RELEASE = SearchAttributeKey.for_keyword("TidegateRelease")
PHASE = SearchAttributeKey.for_keyword("TidegatePhase")
OUTCOME = SearchAttributeKey.for_keyword("TidegateOutcome")

DEVICE = SearchAttributeKey.for_keyword("TidegateDevice")
"""A lifecycle workflow's device; the serial number while there is no device yet."""

SEARCH_ATTRIBUTES = (KIND, RELEASE, PHASE, OUTCOME, DEVICE)
"""Registered by the worker as it starts (workflows.client.register_search_attributes)."""
