"""How programs start, join and find the waits for devices' shadows.

```python
handle = await start_shadow_sync(client, SyncShadowInput(device_id="motor-7", patch={"power": "on"}, actor="alice"))
result = await handle.result()
```
"""

import hashlib
import json
from datetime import timedelta

from temporalio.client import Client, WorkflowHandle
from temporalio.common import (
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)

from models.ids import shadow_workflow_id
from models.quantities import format_duration
from models.shadow import SyncShadowInput, SyncShadowResult
from workflows import options
from workflows.attributes import found_by
from workflows.shadow_sync import ShadowSyncWorkflow

Sync = WorkflowHandle[ShadowSyncWorkflow, SyncShadowResult]
TOKEN_DIGITS = 12


def sync_token(asked: SyncShadowInput) -> str:
    """Names what is wanted: who asks for the same again, while it is waited for, joins."""
    wanted = json.dumps([asked.device_id, asked.shadow, asked.patch, asked.expected_version], sort_keys=True)
    return hashlib.sha256(wanted.encode()).hexdigest()[:TOKEN_DIGITS]


async def start_shadow_sync(client: Client, asked: SyncShadowInput) -> Sync:
    """Start `shadow:<device>/<shadow>/<token>`, or join the one that runs."""
    name = f"shadow {asked.shadow} of {asked.device_id}" if asked.shadow else f"shadow of {asked.device_id}"
    wanted = json.dumps(asked.patch)
    return await client.start_workflow(
        ShadowSyncWorkflow.run,
        asked,
        id=shadow_workflow_id(asked.device_id, asked.shadow, sync_token(asked)),
        task_queue=options.TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        search_attributes=found_by(options.KIND_SHADOW, device=asked.device_id, phase="writing"),
        static_summary=f"{name}: {wanted}"[:200],
        static_details=f"**Wanted** `{wanted[:2000]}` within {format_duration(max(asked.limit, timedelta(seconds=1)))}",
    )


def find_shadow_sync(client: Client, device_id: str, shadow: str, token: str) -> Sync:
    """The wait with this token, running or ended."""
    return client.get_workflow_handle_for(ShadowSyncWorkflow.run, shadow_workflow_id(device_id, shadow, token))
