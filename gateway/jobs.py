"""The jobs protocol: what each request does to the Ledger, and what is answered. Pure but for the signing of orders.

Answers are built while the Ledger is at hand and published only after it has been committed.
"""

import dataclasses
from typing import Any

import orjson

from domain.admission import Ledger
from domain.ledger_rows import ExecutionRow, Refusal
from gateway.documents import Documents
from gateway.requests import BadRequest, Request
from models.protocol import (
    MAX_NOTIFIED_JOBS,
    NEXT_JOB,
    TERMINAL_STATES,
    ErrorCode,
    ExecutionState,
    RequestTopic,
    Verb,
    jobs_topic,
)

Outgoing = tuple[str, bytes]


def answer(request: Request, ledger: Ledger, documents: Documents, now: float) -> list[Outgoing]:
    """Do what is asked, and return what is to be published once it is committed."""
    match request.topic.verb:
        case Verb.START_NEXT:
            return _start_next(request, ledger, documents, now)
        case Verb.UPDATE:
            return _update(request, ledger, documents, now)
        case Verb.DESCRIBE:
            return _describe(request, ledger, documents, now)
        case Verb.GET_PENDING:
            return [_accepted(request, _pending(request.topic.thing, ledger, now), now)]
        case _:
            return []


def reject(topic: RequestTopic, bad: BadRequest, now: float) -> list[Outgoing]:
    """The answer to what is no request about jobs."""
    return [_rejection(topic, bad.token, Refusal(bad.code, bad.message), now)]


def _start_next(request: Request, ledger: Ledger, documents: Documents, now: float) -> list[Outgoing]:
    thing = request.topic.thing
    for execution in ledger.pending_of(thing, now):
        if not documents.has(execution.job_no):
            continue
        if execution.state is ExecutionState.QUEUED and ledger.admit(execution, now, request.details) is not None:
            continue
        described = describe(execution, ledger, documents, now)
        return [_accepted(request, {"execution": described}, now)]
    return [_accepted(request, {}, now)]


def _update(request: Request, ledger: Ledger, documents: Documents, now: float) -> list[Outgoing]:
    topic, report = request.topic, request.report
    assert report is not None and topic.job_id is not None
    if request.duplicate:
        report = dataclasses.replace(report, duplicate=True)
    execution = ledger.find(topic.job_id, topic.thing)
    applied = request.duplicate and ledger.has_applied(execution, report)
    refusal = None if applied else ledger.report(execution, report, now)
    if refusal is not None:
        return [_rejection(topic, request.token, refusal, now, execution)]
    assert execution is not None
    body: dict[str, Any] = {}
    if request.want_state:
        body["executionState"] = _answered_state(execution)
    # Not of the next attempt, which has not begun: its order would be one that nobody has admitted.
    if request.want_document and execution.state is not ExecutionState.QUEUED and documents.has(execution.job_no):
        body["jobDocument"] = documents.render(execution, ledger.jobs[execution.job_no], int(now))
    messages = [_accepted(request, body, now)]
    if execution.state in TERMINAL_STATES or execution.ended_attempt is not None:
        messages += notifications(topic.thing, ledger, now)
    return messages


def _describe(request: Request, ledger: Ledger, documents: Documents, now: float) -> list[Outgoing]:
    topic = request.topic
    if topic.job_id == NEXT_JOB:
        pending = ledger.pending_of(topic.thing, now)
        body = {"execution": describe(pending[0], ledger, documents, now)} if pending else {}
        return [_accepted(request, body, now)]
    execution = ledger.find(topic.job_id or "", topic.thing)
    if execution is None:
        missing = Refusal(ErrorCode.RESOURCE_NOT_FOUND, "no such execution for this thing")
        return [_rejection(topic, request.token, missing, now)]
    return [_accepted(request, {"execution": describe(execution, ledger, documents, now)}, now)]


def notifications(thing: str, ledger: Ledger, now: float) -> list[Outgoing]:
    """`notify` and `notify-next` for a device whose list of pending executions has changed."""
    pending = ledger.pending_of(thing, now)
    lists: dict[str, list[dict[str, Any]]] = {}
    for execution in pending[:MAX_NOTIFIED_JOBS]:
        lists.setdefault(execution.state.value, []).append(_summary(execution, ledger))
    head: dict[str, Any] = {"timestamp": int(now)}
    if pending:
        head["execution"] = {**_summary(pending[0], ledger), "thingName": thing, "status": pending[0].state.value}
    return [
        (jobs_topic(thing, "notify"), orjson.dumps({"timestamp": int(now), "jobs": lists})),
        (jobs_topic(thing, "notify-next"), orjson.dumps(head)),
    ]


def describe(execution: ExecutionRow, ledger: Ledger, documents: Documents, now: float) -> dict[str, Any]:
    """An `Exec`. The document has an order only while the device may act on it: IN_PROGRESS.

    A queued one has the rest of the document: AWS's first SDK for Node.js hands no job without a document on.
    """
    described = {
        **_summary(execution, ledger),
        "thingName": execution.device_id,
        "status": execution.state.value,
        "statusDetails": execution.details or {},
    }
    if documents.has(execution.job_no):
        if execution.state is ExecutionState.IN_PROGRESS:
            described["jobDocument"] = documents.render(execution, ledger.jobs[execution.job_no], int(now))
        elif execution.state is ExecutionState.QUEUED:
            described["jobDocument"] = documents.preview(execution)
    return described


def _pending(thing: str, ledger: Ledger, now: float) -> dict[str, Any]:
    pending = ledger.pending_of(thing, now)
    return {
        "inProgressJobs": [_summary(e, ledger) for e in pending if e.state is ExecutionState.IN_PROGRESS],
        "queuedJobs": [_summary(e, ledger) for e in pending if e.state is ExecutionState.QUEUED],
    }


def _summary(execution: ExecutionRow, ledger: Ledger) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "jobId": ledger.jobs[execution.job_no].job_id,
        "queuedAt": int(execution.queued_at or 0),
        "lastUpdatedAt": int(execution.updated_at or 0),
        "versionNumber": execution.version_number,
        "executionNumber": execution.execution_number,
    }
    if execution.started_at is not None:
        summary["startedAt"] = int(execution.started_at)
    return summary


def _state(execution: ExecutionRow) -> dict[str, Any]:
    return {
        "status": execution.state.value,
        "statusDetails": execution.details or {},
        "versionNumber": execution.version_number,
    }


def _answered_state(execution: ExecutionRow) -> dict[str, Any]:
    """What a report has brought about: of an attempt that failed that it failed, whatever follows."""
    ended = execution.ended_attempt
    if ended is None:
        return _state(execution)
    return {
        "status": ended.state.value,
        "statusDetails": ended.details or {},
        "versionNumber": ended.version_number,
    }


def _request_topic(topic: RequestTopic) -> str:
    match topic.verb:
        case Verb.GET_PENDING:
            return jobs_topic(topic.thing, "get")
        case Verb.START_NEXT:
            return jobs_topic(topic.thing, "start-next")
        case Verb.DESCRIBE:
            return jobs_topic(topic.thing, topic.job_id or "", "get")
        case _:
            return jobs_topic(topic.thing, topic.job_id or "", "update")


def _accepted(request: Request, body: dict[str, Any], now: float) -> Outgoing:
    body["timestamp"] = int(now)
    if request.token is not None:
        body["clientToken"] = request.token
    return f"{_request_topic(request.topic)}/accepted", orjson.dumps(body)


def _rejection(
    topic: RequestTopic, token: str | None, refusal: Refusal, now: float, execution: ExecutionRow | None = None
) -> Outgoing:
    body: dict[str, Any] = {"code": refusal.code.value, "message": refusal.message, "timestamp": int(now)}
    if token is not None:
        body["clientToken"] = token
    if execution is not None:
        body["executionState"] = _state(execution)
    return f"{_request_topic(topic)}/rejected", orjson.dumps(body)
