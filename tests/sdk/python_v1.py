"""PyPI `AWSIoTPythonSDK`: `AWSIoTMQTTShadowClient` and `AWSIoTMQTTThingJobsClient` over one connection (MQTT 3.1.1)."""

import json
import queue
from typing import Any

from AWSIoTPythonSDK.core.jobs.thingJobManager import (
    jobExecutionStatus,
    jobExecutionTopicReplyType,
    jobExecutionTopicType,
)
from AWSIoTPythonSDK.MQTTLib import AWSIoTMQTTShadowClient, AWSIoTMQTTThingJobsClient

from models.protocol import Verb, shadow_topic
from tests.sdk.judge import ANSWER_SECONDS, Answer, Judge

_KINDS = {
    Verb.GET_PENDING: jobExecutionTopicType.JOB_GET_PENDING_TOPIC,
    Verb.START_NEXT: jobExecutionTopicType.JOB_START_NEXT_TOPIC,
    Verb.DESCRIBE: jobExecutionTopicType.JOB_DESCRIBE_TOPIC,
    Verb.UPDATE: jobExecutionTopicType.JOB_UPDATE_TOPIC,
}
_STATES = {state[1]: state for name, state in vars(jobExecutionStatus).items() if name.startswith("JOB_")}


class PythonV1(Judge):
    """Its tokens are its own: one per shadow request, its client id in every request about jobs."""

    named = False

    def open(self, shadows: tuple[str, ...]) -> None:
        shadow_client = AWSIoTMQTTShadowClient(self.thing)
        shadow_client.configureEndpoint(self.host, self.port)
        shadow_client.configureCredentials(str(self.who.ca), str(self.who.private_key), str(self.who.certificate))
        shadow_client.configureAutoReconnectBackoffTime(1, 2, 5)
        shadow_client.configureConnectDisconnectTimeout(10)
        shadow_client.configureMQTTOperationTimeout(10)
        assert shadow_client.connect(30)
        self._shadows = shadow_client
        connection = shadow_client.getMQTTConnection()
        self._jobs = AWSIoTMQTTThingJobsClient(self.thing, self.thing, QoS=1, awsIoTMQTTClient=connection)
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._subscribed: set[tuple[Any, str]] = set()
        self._handler = shadow_client.createShadowHandlerWithName(self.thing, True)
        if shadows:
            self._handler.shadowRegisterDeltaCallback(
                lambda payload, _status, _token: self.events.put("delta", "", json.loads(payload))
            )
            connection.subscribe(shadow_topic(self.thing, "", "update", "documents"), 1, self._event("documents"))
        for kind, what in (
            ("notify", jobExecutionTopicType.JOB_NOTIFY_TOPIC),
            ("notify-next", jobExecutionTopicType.JOB_NOTIFY_NEXT_TOPIC),
        ):
            assert self._jobs.createJobSubscription(self._event(kind), what)

    def _event(self, kind: str) -> Any:
        return lambda _client, _data, message: self.events.put(kind, "", json.loads(message.payload))

    def ask(self, verb: Verb, body: dict[str, Any] | None = None, *, shadow: str = "", job: str = "") -> Answer:
        assert not shadow, "this SDK knows no named shadow"
        return self._ask_jobs(verb, body or {}, job) if verb in _KINDS else self._ask_shadow(verb, body or {})

    def _ask_shadow(self, verb: Verb, body: dict[str, Any]) -> Answer:
        answers: queue.Queue[tuple[str, str, str]] = queue.Queue()

        def answered(payload: str, status: str, token: str) -> None:
            answers.put((payload, status, token))

        match verb:
            case Verb.SHADOW_GET:
                token = self._handler.shadowGet(answered, ANSWER_SECONDS)
            case Verb.SHADOW_DELETE:
                token = self._handler.shadowDelete(answered, ANSWER_SECONDS)
            case _:
                token = self._handler.shadowUpdate(json.dumps(body), answered, ANSWER_SECONDS)
        payload, status, theirs = answers.get(timeout=ANSWER_SECONDS + 5)
        assert status != "timeout", f"{verb}: the SDK has waited in vain"
        assert theirs == token == json.loads(payload)["clientToken"]
        return Answer(status == "accepted", json.loads(payload))

    def _subscribe(self, kind: Any, job: str) -> None:
        if (kind, job) in self._subscribed:
            return
        for accepted, reply in (
            (True, jobExecutionTopicReplyType.JOB_ACCEPTED_REPLY_TYPE),
            (False, jobExecutionTopicReplyType.JOB_REJECTED_REPLY_TYPE),
        ):
            assert self._jobs.createJobSubscription(
                lambda _client, _data, message, accepted=accepted: self._answers.put(
                    Answer(accepted, json.loads(message.payload))
                ),
                kind,
                reply,
                job or None,
            )
        self._subscribed.add((kind, job))

    def _ask_jobs(self, verb: Verb, body: dict[str, Any], job: str) -> Answer:
        kind = _KINDS[verb]
        self._subscribe(kind, job)
        match verb:
            case Verb.GET_PENDING:
                sent = self._jobs.sendJobsQuery(kind)
            case Verb.START_NEXT:
                sent = self._jobs.sendJobsStartNext(body.get("statusDetails"))
            case Verb.DESCRIBE:
                sent = self._jobs.sendJobsDescribe(job)
            case _:
                sent = self._jobs.sendJobsUpdate(
                    job,
                    _STATES[body["status"]],
                    body.get("statusDetails"),
                    body.get("expectedVersion", 0),
                    body.get("executionNumber", 0),
                    body.get("includeJobExecutionState", False),
                    body.get("includeJobDocument", False),
                )
        assert sent
        answer = self._answers.get(timeout=ANSWER_SECONDS)
        assert answer.body["clientToken"] == self.thing
        return answer

    def close(self) -> None:
        self._shadows.disconnect()
