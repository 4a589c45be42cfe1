"""A rollout: plan, prepare, then wave after wave, each judged before the next begins.

A plan that cannot be made (no such release, no device, devices held by another rollout) does not fail the workflow: it
completes with the outcome REFUSED and the reason in its result, so that the UI, the command line and the exit status
all say why.

Where each device stands is PostgreSQL's. What an operator asks (pause, resume, approve, promote, abort, adjust) takes
effect there first, through an activity, and then here: when an update has returned, it holds.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError, is_cancelled_exception
from temporalio.workflow import ChildWorkflowHandle

from workflows.sandbox import decisions

with workflow.unsafe.imports_passed_through():
    from models.ids import rollout_job_id, wave_workflow_id
    from models.rollout import (
        AbortRolloutInput,
        AdjustPaceInput,
        AdjustRolloutInput,
        ApproveRolloutInput,
        CheckPromotableInput,
        CloseWaveInput,
        DecidedWave,
        DevicePlace,
        DriveMode,
        DriveWaveInput,
        EndSoakInput,
        FindDeviceInput,
        FinishRolloutInput,
        JobStatus,
        Outcome,
        PauseRolloutInput,
        Phase,
        PlannedWave,
        PlanRolloutInput,
        PromoteRolloutInput,
        ResumeRolloutInput,
        RolloutResult,
        RolloutState,
        RolloutStatus,
        RunWaveInput,
        RunWaveResult,
        SetJobStatusInput,
        StartRolloutInput,
        Verdict,
        WaveSoaking,
        WaveVerdict,
    )
    from models.spec import Approval
    from workflows import options, steps
    from workflows.answers import in_its_words, refusal, refuse, root_of, said_by
    from workflows.attributes import found_by, show_phase
    from workflows.wave import WaveWorkflow

with decisions():
    from domain import steering
    from domain.verdicts import with_promotion
    from workflows.details import rollout_details


@dataclass(frozen=True)
class _End:
    """How the process ended; what is left is to finish."""

    outcome: Outcome
    reason: str


@workflow.defn
class RolloutWorkflow:
    """See the module."""

    @workflow.init
    def __init__(self, asked: StartRolloutInput) -> None:
        self._asked, self._spec = asked, asked.spec
        self._state = asked.state.model_copy(deep=True) if asked.state else RolloutState(pace=asked.spec.pace)
        self._lock = asyncio.Lock()
        self._process: asyncio.Task[_End | None] | None = None
        self._child: ChildWorkflowHandle[WaveWorkflow, RunWaveResult] | None = None
        self._shown = self._state.shown_phase

    # --- the process, from top to bottom -------------------------------------------------------------------------------

    @workflow.run
    async def run(self, asked: StartRolloutInput) -> RolloutResult:
        """Roll out, whatever happens on the way: halted, aborted or refused is a result, not an error."""
        self._show()
        self._process = asyncio.create_task(self._roll())
        try:
            end = await self._process
        except (asyncio.CancelledError, FailureError) as error:
            end = self._cut_short(error)
        if end is None:
            await workflow.wait_condition(workflow.all_handlers_finished)
            workflow.continue_as_new(asked.model_copy(update={"state": self._state}))
        result = await self._finish(end)
        await workflow.wait_condition(workflow.all_handlers_finished)
        return result

    async def _roll(self) -> _End | None:
        """Wave after wave. None: the history is long, go on as a new run."""
        state = self._state
        refused = await self._plan()
        if refused is not None:
            return refused
        if state.plan is not None and not state.prepared:
            await steps.prepare(state.plan)
            state.prepared = True
        for planned in state.plan.waves[len(state.decided) :] if state.plan else ():
            halted = await self._wait_to_open(planned)
            verdict = halted or await self._run_wave(planned)
            if verdict.verdict is Verdict.HOLD:
                verdict = await self._hold(planned, verdict)
            if verdict.verdict is not Verdict.PROMOTE:
                async with self._lock:  # an abort that is under way is the better explanation
                    if state.aborted_by:
                        # A wave that ends just as it is cancelled keeps its result, and the cancellation is lost on it.
                        raise asyncio.CancelledError
                    return _End(Outcome.HALTED, verdict.reason)
            state.decided.append(DecidedWave(wave=planned.wave, verdict=verdict))
            self._show()
            if workflow.info().is_continue_as_new_suggested():
                return None
        await self._watch_until(lambda: not state.paused_by)
        return _End(Outcome.SUCCEEDED, state.decided[-1].verdict.reason if state.decided else "nothing to do")

    async def _plan(self) -> _End | None:
        """Plan once; an abort that came meanwhile is heeded when it is known which job to close."""
        state = self._state
        if state.plan is None:
            planning = asyncio.create_task(
                steps.plan(PlanRolloutInput(spec=self._spec, requested_by=self._asked.requested_by))
            )
            try:
                state.plan = await asyncio.shield(planning)
            except asyncio.CancelledError:
                state.plan = await planning
                raise
            except ActivityError as error:
                if (refused := refusal(error)) is None:
                    raise
                return _End(Outcome.REFUSED, refused)
            self._show()
        if state.aborted_by:
            raise asyncio.CancelledError
        return None

    async def _wait_to_open(self, planned: PlannedWave) -> WaveVerdict | None:
        """Approval where the specification asks for it, and no wave opens while paused. HALT: a breaker tripped."""
        state = self._state
        asks = {Approval.NONE: False, Approval.START: planned.wave == 1, Approval.EVERY_WAVE: True}
        if asks[self._spec.approval] and state.approved_wave < planned.wave:
            self._move_to(Phase.WAITING_APPROVAL, "", waiting_for=f"approval of wave {planned.wave} ({planned.name})")
            if state.wave == 0:
                await self._set_status(self._unpaused_status, Phase.WAITING_APPROVAL, state.waiting_for, "tidegate")
            halted = await self._watch_until(lambda: state.approved_wave >= planned.wave)
            if halted is not None:
                return halted
        return await self._watch_until(lambda: not state.paused_by)

    async def _run_wave(self, planned: PlannedWave) -> WaveVerdict:
        state, plan, name = self._state, self._state.plan, self._spec.name
        assert plan is not None
        state.wave, state.promoted_by, state.promote_reason = planned.wave, "", ""
        self._move_to(Phase.ROLLING, f"wave {planned.wave} of {len(plan.waves)} ({planned.name})")
        try:
            self._child = await workflow.start_child_workflow(
                WaveWorkflow.run,
                RunWaveInput(
                    rollout=name,
                    job_no=plan.job_no,
                    wave=planned.wave,
                    name=planned.name,
                    target_count=planned.devices,
                    spec=self._spec,
                    is_last=planned.wave == plan.waves[-1].wave,
                ),
                id=wave_workflow_id(name, planned.wave),
                search_attributes=found_by(options.KIND_WAVE, release=self._spec.release),
                static_summary=f"wave {planned.wave} ({planned.name}), {planned.devices} devices",
            )
            return (await self._child).verdict
        finally:
            self._child, state.soak_until = None, None

    async def _hold(self, planned: PlannedWave, verdict: WaveVerdict) -> WaveVerdict:
        """Wait for a person. The wave stays open and watched; a breaker that trips decides."""
        state = self._state
        self._move_to(Phase.HOLDING, verdict.reason, waiting_for="a person to promote or abort")
        halted = await self._watch_until(lambda: bool(state.promoted_by) and not state.paused_by)
        if halted is not None:
            return halted
        promoted = with_promotion(verdict, state.promoted_by, state.promote_reason)
        assert state.plan is not None
        await steps.close_wave(CloseWaveInput(job_no=state.plan.job_no, wave=planned.wave, verdict=promoted))
        return promoted

    async def _watch_until(self, ready: Callable[[], bool]) -> WaveVerdict | None:
        """Wait for a person while waves that are open stay watched: deadlines run, late devices are served.

        Returns the verdict when a breaker trips meanwhile, else None.
        """
        state = self._state
        if ready():
            return None
        if state.wave == 0:
            await workflow.wait_condition(ready)
            return None
        assert state.plan is not None
        asked = DriveWaveInput(
            job_no=state.plan.job_no,
            wave=state.wave,
            spec=self._spec,
            mode=DriveMode.SOAKING,
            phase=state.phase,
            phase_reason=state.waiting_for,
        )
        return await steps.watch_until(ready, asked, state.plan.waves[state.wave - 1].name)

    def _cut_short(self, error: BaseException) -> _End:
        state = self._state
        if state.aborted_by:
            said = f": {state.abort_reason}" if state.abort_reason else ""
            return _End(Outcome.ABORTED, f"aborted by {state.aborted_by}{said}")
        if is_cancelled_exception(error):
            return _End(Outcome.ABORTED, "aborted: the workflow was cancelled")
        return _End(Outcome.FAILED, f"failed: {root_of(error)}")

    async def _finish(self, end: _End) -> RolloutResult:
        """Close the job. What has not started is withdrawn; devices that update are waited for."""
        state, drain = self._state, end.outcome is not Outcome.SUCCEEDED
        state.outcome, state.waiting_for = end.outcome, ""
        name = self._spec.name
        if state.plan is None:
            self._move_to(Phase.DONE, end.reason)
            return RolloutResult(name=name, outcome=end.outcome, reason=end.reason)
        if drain:
            self._move_to(Phase.DRAINING, end.reason, waiting_for="devices in progress to end")
        figures = await steps.finish(
            FinishRolloutInput(job_no=state.plan.job_no, outcome=end.outcome, reason=end.reason, drain=drain)
        )
        self._move_to(Phase.DONE, end.reason)
        known = {field: value for field, value in figures if field != "outcome"}
        return RolloutResult(name=name, outcome=end.outcome, reason=end.reason, **known)

    # --- what is shown, and what is kept --------------------------------------------------------------------------------

    def _move_to(self, phase: Phase, reason: str, waiting_for: str = "") -> None:
        """The one place where the phase changes: for the state, the UI and the search attributes."""
        state, before = self._state, self._shown
        state.phase, state.reason, state.waiting_for = phase, reason, waiting_for
        self._show()
        self._shown = state.shown_phase
        if self._shown is before:
            return
        show_phase(str(self._shown), str(state.outcome) if phase is Phase.DONE and state.outcome is not None else None)

    def _show(self) -> None:
        workflow.set_current_details(rollout_details(self._spec, self._state))

    async def _set_status(self, status: JobStatus, phase: Phase, reason: str, actor: str) -> None:
        assert self._state.plan is not None
        asked = SetJobStatusInput(
            job_no=self._state.plan.job_no, status=status, phase=phase, reason=reason, actor=actor
        )
        await in_its_words(steps.set_status(asked))

    @property
    def _unpaused_status(self) -> JobStatus:
        return JobStatus.RUNNING if self._state.wave else JobStatus.PLANNED

    # --- updates: each takes effect in PostgreSQL before it returns -----------------------------------------------------

    @workflow.update
    async def pause(self, asked: PauseRolloutInput) -> RolloutStatus:
        """Admission stops with the next transaction; no wave opens and none is promoted until resumed."""
        async with self._lock:
            refuse(steering.why_not_pause(self._state))
            await self._set_status(
                JobStatus.PAUSED, Phase.PAUSED, said_by("paused", asked.actor, asked.reason), asked.actor
            )
            self._state.paused_by, self._state.pause_reason = asked.actor, asked.reason
            self._move_to(self._state.phase, self._state.reason, self._state.waiting_for)
        return self.status()

    @pause.validator
    def _check_pause(self, asked: PauseRolloutInput) -> None:
        refuse(steering.why_not_pause(self._state))

    @workflow.update
    async def resume(self, asked: ResumeRolloutInput) -> RolloutStatus:
        """Admission goes on where it stopped."""
        async with self._lock:
            refuse(steering.why_not_resume(self._state))
            said = said_by("resumed", asked.actor, asked.reason)
            await self._set_status(self._unpaused_status, self._state.phase, said, asked.actor)
            self._state.paused_by, self._state.pause_reason = "", ""
            self._move_to(self._state.phase, self._state.reason, self._state.waiting_for)
        return self.status()

    @resume.validator
    def _check_resume(self, asked: ResumeRolloutInput) -> None:
        refuse(steering.why_not_resume(self._state))

    @workflow.update
    async def approve(self, asked: ApproveRolloutInput) -> RolloutStatus:
        """The wave that waits may open."""
        async with self._lock:
            refuse(steering.why_not_approve(self._state))
            wave = self._state.wave + 1
            paused = bool(self._state.paused_by)
            said = said_by(f"wave {wave} approved", asked.actor, asked.reason)
            await self._set_status(
                JobStatus.PAUSED if paused else self._unpaused_status,
                Phase.PAUSED if paused else Phase.ROLLING,
                said,
                asked.actor,
            )
            self._state.approved_wave = wave
            self._move_to(Phase.ROLLING, said)
        return self.status()

    @approve.validator
    def _check_approve(self, asked: ApproveRolloutInput) -> None:
        refuse(steering.why_not_approve(self._state))

    @workflow.update
    async def promote(self, asked: PromoteRolloutInput) -> RolloutStatus:
        """End a hold, or the rest of a soak, in favour of the release; refused once a breaker has tripped."""
        async with self._lock:
            state = self._state
            refuse(steering.why_not_promote(state))
            assert state.plan is not None
            wave = state.wave
            check = CheckPromotableInput(job_no=state.plan.job_no, wave=wave, spec=self._spec)
            await in_its_words(steps.check_promotable(check))
            refuse(steering.why_not_promote(state) if state.wave == wave else f"wave {wave} has just promoted itself")
            if self._child is not None:
                await self._child.signal(WaveWorkflow.end_soak, EndSoakInput(actor=asked.actor, reason=asked.reason))
            state.promoted_by, state.promote_reason = asked.actor, asked.reason
            self._show()
        return self.status()

    @promote.validator
    def _check_promote(self, asked: PromoteRolloutInput) -> None:
        refuse(steering.why_not_promote(self._state))

    @workflow.update
    async def abort(self, asked: AbortRolloutInput) -> RolloutStatus:
        """End the rollout: nothing more is admitted, from now on."""
        async with self._lock:
            state = self._state
            refuse(steering.why_not_abort(state))
            if state.plan is not None:
                said = said_by("aborted", asked.actor, asked.reason)
                await self._set_status(JobStatus.HALTED, Phase.DRAINING, said, asked.actor)
            refuse(steering.why_not_abort(state))
            state.aborted_by, state.abort_reason = asked.actor, asked.reason
            if state.plan is not None and self._process is not None:
                self._process.cancel()
        return self.status()

    @abort.validator
    def _check_abort(self, asked: AbortRolloutInput) -> None:
        refuse(steering.why_not_abort(self._state))

    @workflow.update
    async def adjust(self, asked: AdjustRolloutInput) -> RolloutStatus:
        """New cap and pace, kept by the next admission."""
        async with self._lock:
            state = self._state
            refuse(steering.why_not_adjust(state, asked))
            assert state.plan is not None
            pace = steering.adjusted_pace(state.pace, asked)
            await in_its_words(
                steps.adjust_pace(AdjustPaceInput(job_no=state.plan.job_no, pace=pace, actor=asked.actor))
            )
            state.pace = pace
            self._show()
        return self.status()

    @adjust.validator
    def _check_adjust(self, asked: AdjustRolloutInput) -> None:
        refuse(steering.why_not_adjust(self._state, asked))

    # --- signals and queries ----------------------------------------------------------------------------------------

    @workflow.signal(name=options.WAVE_SOAKING)
    def wave_soaking(self, asked: WaveSoaking) -> None:
        """The running wave has answered and is watched."""
        if self._child is not None and asked.wave == self._state.wave:
            self._state.soak_until = asked.until
            self._move_to(Phase.SOAKING, asked.reason)

    @workflow.query
    def status(self) -> RolloutStatus:
        """Where the rollout stands, as far as the workflow knows; counts are PostgreSQL's."""
        state = self._state
        running = state.planned_wave(state.wave)
        return RolloutStatus(
            name=self._spec.name,
            phase=state.shown_phase,
            reason=state.pause_reason or state.reason if state.paused_by else state.reason,
            wave=state.wave,
            wave_name=running.name if running else "",
            job_no=state.plan.job_no if state.plan else None,
            devices=state.plan.devices if state.plan else 0,
            waiting_for=state.waiting_for,
            soak_until=state.soak_until,
            outcome=state.outcome,
            pace=state.pace,
            verdicts=tuple(decided.verdict.reason for decided in state.decided),
        )

    @workflow.query
    def device(self, asked: FindDeviceInput) -> DevicePlace:
        """Where one device's execution is found, and which waves are served. See DevicePlace for why not the state."""
        state = self._state
        served = tuple(wave for wave in state.plan.waves if wave.wave <= state.wave) if state.plan else ()
        return DevicePlace(
            rollout=self._spec.name,
            device_id=asked.device_id,
            job_id=rollout_job_id(self._spec.name),
            job_no=state.plan.job_no if state.plan else None,
            phase=state.shown_phase,
            waves_served=served,
        )
