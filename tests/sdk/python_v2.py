"""PyPI `awsiotsdk`: its request-response clients and its classic ones, each over MQTT 5 and over MQTT 3.1.1."""

import threading
import uuid
from concurrent.futures import Future
from datetime import datetime
from types import ModuleType
from typing import Any

import awsiot
from awscrt import io, mqtt, mqtt5, mqtt_request_response
from awsiot import iotjobs, iotshadow, mqtt5_client_builder, mqtt_connection_builder

from models.protocol import Verb
from tests.integration.access_setup import Credentials
from tests.sdk.judge import ANSWER_SECONDS, Answer, Judge

_CALLS = {
    Verb.GET_PENDING: (iotjobs, "get_pending_job_executions"),
    Verb.START_NEXT: (iotjobs, "start_next_pending_job_execution"),
    Verb.DESCRIBE: (iotjobs, "describe_job_execution"),
    Verb.UPDATE: (iotjobs, "update_job_execution"),
    Verb.SHADOW_GET: (iotshadow, "get_shadow"),
    Verb.SHADOW_UPDATE: (iotshadow, "update_shadow"),
    Verb.SHADOW_DELETE: (iotshadow, "delete_shadow"),
}
_OF_SHADOWS = {"delta": "shadow_delta_updated", "documents": "shadow_updated"}
_OF_JOBS = {"notify": "job_executions_changed", "notify-next": "next_job_execution_changed"}


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)


def _class(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def plain(value: Any) -> Any:
    """A modelled object as the wire would have it; what is missing is left out."""
    if isinstance(value, awsiot.ModeledClass):
        names = [name for name in type(value).__slots__ if not name.endswith("_is_nullable")]
        made = {_camel(name): plain(getattr(value, name)) for name in names}
        return {name: inner for name, inner in made.items() if inner is not None}
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    return value


class PythonV2(Judge):
    """What the four have in common. The event loop is the judge's own, so that it ends with it."""

    mqtt5 = True

    def __init__(self, host: str, port: int, who: Credentials) -> None:
        super().__init__(host, port, who)
        self._loops = io.EventLoopGroup(1)
        self._resolver = io.DefaultHostResolver(self._loops)
        self._bootstrap = io.ClientBootstrap(self._loops, self._resolver)
        self._stopped = threading.Event()
        self._client: Any = None

    def _connect(self) -> None:
        files = {
            "endpoint": self.host,
            "port": self.port,
            "cert_filepath": str(self.who.certificate),
            "pri_key_filepath": str(self.who.private_key),
            "ca_filepath": str(self.who.ca),
            "client_id": self.thing,
            "client_bootstrap": self._bootstrap,
        }
        if not self.mqtt5:
            connection = mqtt_connection_builder.mtls_from_path(
                **files,
                clean_session=True,
                keep_alive_secs=30,
                ping_timeout_ms=5000,
                reconnect_min_timeout_secs=1,
                reconnect_max_timeout_secs=2,
                on_connection_resumed=lambda connection, return_code, session_present, **_: (
                    None if session_present else connection.resubscribe_existing_topics()
                ),
            )
            self._client = connection
            self._wrap()
            connection.connect().result(ANSWER_SECONDS)
            return
        connected = threading.Event()
        client = mqtt5_client_builder.mtls_from_path(
            **files,
            min_reconnect_delay_ms=250,
            max_reconnect_delay_ms=1000,
            on_lifecycle_connection_success=lambda _: (self._connected_anew(), connected.set()),
            on_lifecycle_stopped=lambda _: self._stopped.set(),
        )
        self._client = client
        self._wrap()
        client.start()
        assert connected.wait(ANSWER_SECONDS), "the SDK did not connect"

    def _connected_anew(self) -> None:
        """What an application has to do itself where the broker has lost its session."""

    def _wrap(self) -> None:
        """Make the clients of the services, before the connection starts."""
        raise NotImplementedError

    def close(self) -> None:
        if self.mqtt5:
            self._client.stop()
            assert self._stopped.wait(ANSWER_SECONDS)
        else:
            self._client.disconnect().result(ANSWER_SECONDS)
        self._forget()
        self._client = None
        ends = self._bootstrap.shutdown_event, self._loops.shutdown_event
        del self._bootstrap, self._resolver, self._loops
        for end in ends:
            assert end.wait(ANSWER_SECONDS), "a thread of the SDK is still there"

    def _forget(self) -> None:
        """Let go of what holds the connection."""
        raise NotImplementedError

    def _request(self, verb: Verb, body: dict[str, Any] | None, shadow: str, job: str) -> tuple[str, ModuleType, Any]:
        """The SDK's name for it, the module, and the request."""
        module, name = _CALLS[verb]
        if shadow:
            name = name.replace("_shadow", "_named_shadow")
        given = {
            "".join("_" + c.lower() if c.isupper() else c for c in key): value for key, value in (body or {}).items()
        }
        if (state := given.get("state")) is not None:
            given["state"] = iotshadow.ShadowState(**state)
            for section, value in state.items():
                setattr(given["state"], f"{section}_is_nullable", value is None)
        request = getattr(module, f"{_class(name)}Request")(**given, **self._subject(shadow, job))
        return name, module, request

    def _subject(self, shadow: str, job: str) -> dict[str, str]:
        return {
            "thing_name": self.thing,
            **({"shadow_name": shadow} if shadow else {}),
            **({"job_id": job} if job else {}),
        }


class RequestResponse(PythonV2):
    """`IotShadowClientV2` and `IotJobsClientV2`: futures, and streams of events."""

    def _wrap(self) -> None:
        options = mqtt_request_response.ClientOptions(10, 10, int(ANSWER_SECONDS))
        self._clients = {
            iotshadow: iotshadow.IotShadowClientV2(self._client, options),
            iotjobs: iotjobs.IotJobsClientV2(self._client, options),
        }
        self._streams: list[Any] = []

    def open(self, shadows: tuple[str, ...]) -> None:
        self._connect()
        for shadow in shadows:
            for kind, name in _OF_SHADOWS.items():
                self._listen(iotshadow, f"named_{name}" if shadow else name, kind, shadow)
        for kind, name in _OF_JOBS.items():
            self._listen(iotjobs, name, kind, "")

    def _listen(self, module: ModuleType, name: str, kind: str, shadow: str) -> None:
        established = threading.Event()

        def changed(event: mqtt_request_response.SubscriptionStatusEvent) -> None:
            if event.type == mqtt_request_response.SubscriptionStatusEventType.SUBSCRIPTION_ESTABLISHED:
                established.set()

        options = awsiot.ServiceStreamOptions(
            incoming_event_listener=lambda event: self.events.put(kind, shadow, plain(event)),
            subscription_status_listener=changed,
            deserialization_failure_listener=lambda failure: self.events.put(
                kind, shadow, {"misread": failure.payload}
            ),
        )
        request = getattr(module, f"{_class(name)}SubscriptionRequest")(**self._subject(shadow, ""))
        stream = getattr(self._clients[module], f"create_{name}_stream")(request, options)
        stream.open()
        self._streams.append(stream)
        assert established.wait(ANSWER_SECONDS), f"{name}: not subscribed"

    def ask(self, verb: Verb, body: dict[str, Any] | None = None, *, shadow: str = "", job: str = "") -> Answer:
        name, module, request = self._request(verb, body, shadow, job)
        future: Future[Any] = getattr(self._clients[module], name)(request)
        try:
            answer = Answer(True, plain(future.result(2 * ANSWER_SECONDS)))
        except awsiot.V2ServiceException as error:
            if error.modeled_error is None:
                raise
            answer = Answer(False, plain(error.modeled_error))
        assert answer.body["clientToken"] == request.client_token
        return answer

    def _forget(self) -> None:
        self._streams.clear()
        self._clients.clear()


class Classic(PythonV2):
    """`IotShadowClient` and `IotJobsClient`: publish, and subscribe to the answers."""

    def _wrap(self) -> None:
        self._clients = {
            iotshadow: iotshadow.IotShadowClient(self._client),
            iotjobs: iotjobs.IotJobsClient(self._client),
        }
        self._waiting: dict[str, Future[Answer]] = {}
        self._subscribed: set[tuple[str, str, str]] = set()

    def _connected_anew(self) -> None:
        self._subscribed.clear()

    def open(self, shadows: tuple[str, ...]) -> None:
        self._connect()
        for shadow in shadows:
            for kind, name in _OF_SHADOWS.items():
                self._listen(iotshadow, f"named_{name}" if shadow else name, kind, shadow)
        for kind, name in _OF_JOBS.items():
            self._listen(iotjobs, name, kind, "")

    def _listen(self, module: ModuleType, name: str, kind: str, shadow: str) -> None:
        request = getattr(module, f"{_class(name)}SubscriptionRequest")(**self._subject(shadow, ""))
        subscribe = getattr(self._clients[module], f"subscribe_to_{name}_events")
        future, _ = subscribe(
            request, mqtt.QoS.AT_LEAST_ONCE, lambda event: self.events.put(kind, shadow, plain(event) or {})
        )
        future.result(ANSWER_SECONDS)

    def _subscribe(self, module: ModuleType, name: str, shadow: str, job: str) -> None:
        if (name, shadow, job) in self._subscribed:
            return
        request = getattr(module, f"{_class(name)}SubscriptionRequest")(**self._subject(shadow, job))
        for accepted, ending in ((True, "accepted"), (False, "rejected")):
            subscribe = getattr(self._clients[module], f"subscribe_to_{name}_{ending}")
            future, _ = subscribe(
                request,
                mqtt.QoS.AT_LEAST_ONCE,
                lambda answer, accepted=accepted: self._answered(accepted, answer),
            )
            future.result(ANSWER_SECONDS)
        self._subscribed.add((name, shadow, job))

    def _answered(self, accepted: bool, answer: Any) -> None:
        if answer is not None and (waiting := self._waiting.get(answer.client_token)) and not waiting.done():
            waiting.set_result(Answer(accepted, plain(answer)))

    def ask(self, verb: Verb, body: dict[str, Any] | None = None, *, shadow: str = "", job: str = "") -> Answer:
        name, module, request = self._request(verb, body, shadow, job)
        self._subscribe(module, name, shadow, job)
        request.client_token = request.client_token or str(uuid.uuid4())
        waiting: Future[Answer] = Future()
        self._waiting[request.client_token] = waiting
        publish = getattr(self._clients[module], f"publish_{name}")
        publish(request, mqtt.QoS.AT_LEAST_ONCE).result(ANSWER_SECONDS)
        return waiting.result(ANSWER_SECONDS)

    def _forget(self) -> None:
        self._clients.clear()


class RequestResponse311(RequestResponse):
    """Over MQTT 3.1.1."""

    mqtt5 = False


class Classic311(Classic):
    """Over MQTT 3.1.1."""

    mqtt5 = False


__all__ = ["Classic", "Classic311", "RequestResponse", "RequestResponse311", "mqtt5"]
