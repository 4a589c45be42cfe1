"""A fleet job: wait for its time, choose the devices, then wave after wave of a rollout's machinery, and close.

A job that cannot be planned (no device, no such release, nothing to retry) completes with the outcome REFUSED and the
reason in its result. A continuous job takes in devices that match later, and lasts until a person or its `end_at` ends
it. Attempts, backoff and deadlines are PostgreSQL's and the wave's driver's business; this is only the process.

What an operator asks (pause, resume, cancel) takes effect in PostgreSQL first, and then here.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError, is_cancelled_exception

from workflows.sandbox import decisions

with workflow.unsafe.imports_passed_through():
    from models.fleetjob import (
        CancelFleetJobInput,
        FleetJobProgress,
        FleetJobResult,
        FleetJobState,
        FleetJobStatus,
        PauseFleetJobInput,
        PlanFleetJobInput,
        ResumeFleetJobInput,
        StartFleetJobInput,
    )
    from models.ids import fleet_job_wave_workflow_id, scheduled_job_name
    from models.jobspec import Membership
    from models.rollout import (
        CancelRunningInput,
        CloseWaveInput,
        DecidedWave,
        DriveMode,
        DriveWaveInput,
        FinishRolloutInput,
        JobStatus,
        Outcome,
        Phase,
        PlannedWave,
        RunWaveInput,
        SetJobStatusInput,
        Verdict,
        WaveSoaking,
        WaveVerdict,
    )
    from workflows import job_steps, options, steps
    from workflows.answers import in_its_words, refusal, refuse, root_of, said_by
    from workflows.attributes import found_by, show_phase
    from workflows.wave import WaveWorkflow

with decisions():
    from domain import job_steering
    from domain.verdicts import with_promotion
    from workflows.details import fleet_job_details


@dataclass(frozen=True)
class _End:
    """How the process ended; what is left is to finish."""

    outcome: Outcome
    reason: str


@workflow.defn
class FleetJobWorkflow:
    """See the module."""

    @workflow.init
    def __init__(self, asked: StartFleetJobInput) -> None:
        self._asked = asked
        self._state = asked.state.model_copy(deep=True) if asked.state else FleetJobState(name=_name_of(asked))
        self._spec = asked.spec.model_copy(update={"name": self._state.name})
        self._progress = FleetJobProgress()
        self._lock = asyncio.Lock()
        self._process: asyncio.Task[_End | None] | None = None
        self._shown = self._state.shown_phase

    # --- the process, from top to bottom -------------------------------------------------------------------------------

    @workflow.run
    async def run(self, asked: StartFleetJobInput) -> FleetJobResult:
        """Do it, whatever happens on the way: halted, cancelled or refused is a result, not an error."""
        self._show()
        self._process = asyncio.create_task(self._work())
        clock = asyncio.create_task(self._end_in_time()) if self._spec.end_at else None
        try:
            end = await self._process
        except (asyncio.CancelledError, FailureError) as error:
            end = self._cut_short(error)
        finally:
            if clock is not None:
                clock.cancel()
        if end is None:
            await workflow.wait_condition(workflow.all_handlers_finished)
            workflow.continue_as_new(asked.model_copy(update={"state": self._state}))
        result = await self._finish(end)
        await workflow.wait_condition(workflow.all_handlers_finished)
        return result

    async def _work(self) -> _End | None:
        """Wave after wave. None: the history is long, go on as a new run."""
        state = self._state
        refused = await self._wait_to_start() or await self._plan()
        if refused is not None:
            return refused
        assert state.plan is not None
        if self._spec.release is not None and not state.prepared:
            await steps.prepare(state.plan)
            state.prepared = True
        for planned in state.plan.waves[len(state.decided) :]:
            halted = await self._watch_until(lambda: not state.paused_by)
            verdict = halted or await self._run_wave(planned)
            if verdict.verdict is Verdict.HOLD:
                verdict = await self._hold(planned, verdict)
            if verdict.verdict is not Verdict.PROMOTE:
                async with self._lock:  # a cancellation that is under way is the better explanation
                    if state.canceled_by or state.time_is_up:
                        # A wave that ends just as it is cancelled keeps its result, and the cancellation is lost on it.
                        raise asyncio.CancelledError
                    return _End(Outcome.HALTED, verdict.reason)
            state.decided.append(DecidedWave(wave=planned.wave, verdict=verdict))
            self._show()
            if workflow.info().is_continue_as_new_suggested():
                return None
        await self._watch_until(lambda: not state.paused_by)
        return _End(Outcome.SUCCEEDED, state.decided[-1].verdict.reason)

    async def _wait_to_start(self) -> _End | None:
        spec, state = self._spec, self._state
        if state.plan is not None:
            return None
        if spec.end_at is not None and spec.end_at <= workflow.now():
            return _End(Outcome.REFUSED, f"cannot start job {spec.name}: its end, {spec.end_at}, has passed")
        if spec.start_at is not None and (wait := spec.start_at - workflow.now()) > options.AT_ONCE:
            self._move_to(Phase.SCHEDULED, f"starts at {spec.start_at.isoformat()}")
            await workflow.sleep(wait, summary=f"until {spec.start_at.isoformat()}")
        await workflow.wait_condition(lambda: not state.paused_by)
        self._move_to(Phase.PLANNING, "")
        return None

    async def _end_in_time(self) -> None:
        """The end that was agreed on: nothing more starts, devices in progress are waited for."""
        assert self._spec.end_at is not None
        wait = self._spec.end_at - workflow.now()
        if wait > options.AT_ONCE:
            await workflow.sleep(wait, summary=f"ends at {self._spec.end_at.isoformat()}")
            async with self._lock:
                if self._process is not None and not self._process.done():
                    self._state.time_is_up = True
                    self._process.cancel()

    async def _plan(self) -> _End | None:
        """Plan once; a cancellation that came meanwhile is heeded when it is known which job to close."""
        state, asked = self._state, self._asked
        if state.plan is not None:
            return None
        request = PlanFleetJobInput(spec=self._spec, requested_by=asked.requested_by, schedule=asked.schedule)
        planning = asyncio.create_task(job_steps.plan(request))
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
        return None

    async def _run_wave(self, planned: PlannedWave) -> WaveVerdict:
        state, plan, spec = self._state, self._state.plan, self._spec
        assert plan is not None
        state.wave = planned.wave
        self._move_to(Phase.ROLLING, f"wave {planned.wave} of {len(plan.waves)} ({planned.name})")
        child = await workflow.start_child_workflow(
            WaveWorkflow.run,
            RunWaveInput(
                rollout=spec.name,
                job_no=plan.job_no,
                wave=planned.wave,
                name=planned.name,
                target_count=planned.devices,
                spec=spec,
                is_last=planned.wave == plan.waves[-1].wave,
            ),
            id=fleet_job_wave_workflow_id(spec.name, planned.wave),
            search_attributes=found_by(options.KIND_WAVE, release=spec.release or None),
            static_summary=f"wave {planned.wave} ({planned.name}), {planned.devices} devices",
        )
        return (await child).verdict

    async def _hold(self, planned: PlannedWave, verdict: WaveVerdict) -> WaveVerdict:
        """Too few have answered for the gate to say anything: wait for a person to resume or cancel."""
        state, plan = self._state, self._state.plan
        assert plan is not None
        state.resumed_by = ""
        self._move_to(Phase.HOLDING, verdict.reason)
        halted = await self._watch_until(lambda: bool(state.resumed_by) and not state.paused_by)
        if halted is not None:
            return halted
        promoted = with_promotion(verdict, state.resumed_by, "")
        await steps.close_wave(CloseWaveInput(job_no=plan.job_no, wave=planned.wave, verdict=promoted))
        return promoted

    async def _watch_until(self, ready: Callable[[], bool]) -> WaveVerdict | None:
        """Wait for a person while waves that are open stay watched. Returns the verdict when a breaker trips, else None."""
        state, plan = self._state, self._state.plan
        if ready():
            return None
        assert plan is not None
        if state.wave == 0:
            await workflow.wait_condition(ready)
            return None
        asked = DriveWaveInput(job_no=plan.job_no, wave=state.wave, spec=self._spec, mode=DriveMode.SOAKING)
        return await steps.watch_until(ready, asked, plan.waves[state.wave - 1].name)

    def _cut_short(self, error: BaseException) -> _End:
        state, spec = self._state, self._spec
        if state.canceled_by:
            return _End(Outcome.ABORTED, said_by("canceled", state.canceled_by, state.cancel_reason))
        if state.time_is_up:
            if spec.membership is Membership.CONTINUOUS:
                return _End(Outcome.SUCCEEDED, f"ended at {spec.end_at}, as agreed")
            return _End(Outcome.ABORTED, f"its time was up at {spec.end_at}")
        if is_cancelled_exception(error):
            return _End(Outcome.ABORTED, "canceled: the workflow was cancelled")
        return _End(Outcome.FAILED, f"failed: {root_of(error)}")

    async def _finish(self, end: _End) -> FleetJobResult:
        """Close the job. What has not started is withdrawn; devices in progress are waited for, or cancelled."""
        state, name = self._state, self._spec.name
        state.outcome = end.outcome
        if state.plan is None:
            self._move_to(Phase.DONE, end.reason)
            return FleetJobResult(name=name, outcome=end.outcome, reason=end.reason)
        drain = end.outcome is not Outcome.SUCCEEDED or state.time_is_up
        if drain:
            self._move_to(Phase.DRAINING, end.reason)
        if state.force:
            await steps.cancel_running(CancelRunningInput(job_no=state.plan.job_no, reason=end.reason))
        figures = await steps.finish(
            FinishRolloutInput(job_no=state.plan.job_no, outcome=end.outcome, reason=end.reason, drain=drain)
        )
        self._progress = FleetJobProgress.of(figures.waves)
        state.outcome = figures.outcome or end.outcome
        self._move_to(Phase.DONE, end.reason)
        return FleetJobResult(
            name=name, outcome=state.outcome, reason=end.reason, progress=self._progress, waves=figures.waves
        )

    # --- what is shown, and what is kept --------------------------------------------------------------------------------

    def _move_to(self, phase: Phase, reason: str) -> None:
        """The one place where the phase changes: for the state, the UI and the search attributes."""
        state, before = self._state, self._shown
        state.phase, state.reason = phase, reason
        self._show()
        self._shown = state.shown_phase
        if self._shown is before:
            return
        show_phase(str(self._shown), str(state.outcome) if phase is Phase.DONE and state.outcome is not None else None)

    def _show(self) -> None:
        workflow.set_current_details(fleet_job_details(self._spec, self._state, self._progress))

    async def _set_status(self, status: JobStatus, phase: Phase, reason: str, actor: str) -> None:
        if self._state.plan is not None:
            job_no = self._state.plan.job_no
            await in_its_words(
                steps.set_status(
                    SetJobStatusInput(job_no=job_no, status=status, phase=phase, reason=reason, actor=actor)
                )
            )

    # --- updates: each takes effect in PostgreSQL before it returns -----------------------------------------------------

    @workflow.update
    async def pause(self, asked: PauseFleetJobInput) -> FleetJobStatus:
        """Admission stops with the next transaction; no wave opens until resumed. Devices in progress go on."""
        async with self._lock:
            refuse(job_steering.why_not_pause(self._state))
            reason = said_by("paused", asked.actor, asked.reason)
            await self._set_status(JobStatus.PAUSED, Phase.PAUSED, reason, asked.actor)
            self._state.paused_by, self._state.pause_reason = asked.actor, asked.reason
            self._move_to(self._state.phase, self._state.reason)
        return self.status()

    @pause.validator
    def _check_pause(self, asked: PauseFleetJobInput) -> None:
        refuse(job_steering.why_not_pause(self._state))

    @workflow.update
    async def resume(self, asked: ResumeFleetJobInput) -> FleetJobStatus:
        """Go on where it stopped: after a pause, or where a wave is held for a person."""
        async with self._lock:
            state = self._state
            refuse(job_steering.why_not_resume(state))
            unpaused = JobStatus.RUNNING if state.wave else JobStatus.PLANNED
            await self._set_status(unpaused, state.phase, said_by("resumed", asked.actor, asked.reason), asked.actor)
            if not state.paused_by:
                state.resumed_by = asked.actor
            state.paused_by, state.pause_reason = "", ""
            self._move_to(state.phase, state.reason)
        return self.status()

    @resume.validator
    def _check_resume(self, asked: ResumeFleetJobInput) -> None:
        refuse(job_steering.why_not_resume(self._state))

    @workflow.update
    async def cancel(self, asked: CancelFleetJobInput) -> FleetJobStatus:
        """End the job: nothing more starts. With `force`, also a second time: what is in progress is cancelled too."""
        async with self._lock:
            state = self._state
            refuse(job_steering.why_not_cancel(state, asked))
            reason = said_by("canceled", asked.actor, asked.reason)
            if state.phase is Phase.DRAINING and state.plan is not None:
                await in_its_words(steps.cancel_running(CancelRunningInput(job_no=state.plan.job_no, reason=reason)))
                state.force = True
                return self.status()
            await self._set_status(JobStatus.HALTED, Phase.DRAINING, reason, asked.actor)
            refuse(job_steering.why_not_cancel(state, asked))
            state.canceled_by, state.cancel_reason, state.force = asked.actor, asked.reason, asked.force
            if self._process is not None:
                self._process.cancel()
        return self.status()

    @cancel.validator
    def _check_cancel(self, asked: CancelFleetJobInput) -> None:
        refuse(job_steering.why_not_cancel(self._state, asked))

    # --- signals and queries ----------------------------------------------------------------------------------------

    @workflow.signal(name=options.WAVE_SOAKING)
    def wave_soaking(self, asked: WaveSoaking) -> None:
        """The running wave has answered and is watched."""
        if asked.wave == self._state.wave and self._state.phase is Phase.ROLLING:
            self._move_to(Phase.SOAKING, asked.reason)

    @workflow.query
    def status(self) -> FleetJobStatus:
        """Where the job stands, as far as the workflow knows; counts are PostgreSQL's."""
        state = self._state
        return FleetJobStatus(
            name=state.name,
            phase=state.shown_phase,
            reason=state.pause_reason or state.reason if state.paused_by else state.reason,
            job_no=state.plan.job_no if state.plan else None,
            devices=state.plan.devices if state.plan else 0,
            wave=state.wave,
            waves=state.plan.waves if state.plan else (),
            start_at=self._spec.start_at,
            outcome=state.outcome,
        )


def _name_of(asked: StartFleetJobInput) -> str:
    """A schedule's runs have the time in their name, which Temporal puts into the workflow's id."""
    if asked.schedule is None:
        return asked.spec.name
    info = workflow.info()
    return scheduled_job_name(info.workflow_id) or f"{asked.spec.name}-{info.start_time:%Y%m%dT%H%M%S}"
