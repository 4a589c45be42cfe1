"""Fleet-wide rotation: one sweep over devices whose certificate is due, at a pace.

The schedule `tidegate-rotation` starts one every hour; `starter.py rotation start` starts one of its own. What has been
done is in PostgreSQL (activities/fleet_rotation.py), and each device's rotation is a workflow of its own.
"""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from models.lifecycle import RotateFleetInput, RotateFleetResult
    from workflows import lifecycle_steps as steps


@workflow.defn
class FleetRotationWorkflow:
    """See the module."""

    @workflow.run
    async def run(self, asked: RotateFleetInput) -> RotateFleetResult:
        """Sweep."""
        steps.show("sweeping", f"asked by {asked.actor}, {asked.per_minute} devices per minute")
        result = await steps.rotate_fleet(asked)
        said = f"{result.due} due, {result.started} asked, {result.running} left alone"
        steps.show("done", said, outcome="swept")
        return result
