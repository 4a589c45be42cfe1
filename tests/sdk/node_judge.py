"""npm `aws-iot-device-sdk` and `aws-iot-device-sdk-v2`, each in a Node.js process that is told by JSON lines what to ask."""

import itertools
import json
import queue
import subprocess
import threading
from pathlib import Path
from typing import Any, ClassVar

from models.protocol import Verb
from tests.sdk.judge import ANSWER_SECONDS, Answer, Judge

SCRIPTS = Path(__file__).parent / "node"


class NodeJudge(Judge):
    """One script, one process."""

    script = "v2.js"
    options: ClassVar[dict[str, Any]] = {}
    modules: Path

    def open(self, shadows: tuple[str, ...]) -> None:
        options = {
            "host": self.host,
            "port": self.port,
            "thing": self.thing,
            "key": str(self.who.private_key),
            "certificate": str(self.who.certificate),
            "ca": str(self.who.ca),
            "shadows": list(shadows),
            **self.options,
        }
        self._process = subprocess.Popen(
            ["node", str(self.modules / self.script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {0: queue.Queue()}
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        self._answers[0].get(timeout=ANSWER_SECONDS)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "event" in message:
                self.events.put(message["event"], message["shadow"], message["body"])
            elif (answers := self._answers.get(message.get("n", 0))) is not None:
                answers.put(message)

    def ask(self, verb: Verb | str, body: dict[str, Any] | None = None, *, shadow: str = "", job: str = "") -> Answer:
        number = next(self._numbers)
        self._answers[number] = queue.Queue()
        line = {"n": number, "verb": str(verb), "body": body or {}, "shadow": shadow, "job": job}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        answer = self._answers[number].get(timeout=70)
        if "error" in answer:
            raise AssertionError(answer["error"])
        return Answer(answer["accepted"], answer["body"])

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(15)
        finally:
            self._process.kill()
            self._process.wait()
            self._reading.join(10)
            self._process.stdout.close()


class NodeRequestResponse(NodeJudge):
    """SDK v2, request-response clients over MQTT 5."""

    options: ClassVar[dict[str, Any]] = {"what": "request-response", "mqtt": 5}


class NodeRequestResponse311(NodeJudge):
    """SDK v2, request-response clients over MQTT 3.1.1."""

    options: ClassVar[dict[str, Any]] = {"what": "request-response", "mqtt": 311}


class NodeClassic(NodeJudge):
    """SDK v2, classic clients over MQTT 5."""

    options: ClassVar[dict[str, Any]] = {"what": "classic", "mqtt": 5}


class NodeClassic311(NodeJudge):
    """SDK v2, classic clients over MQTT 3.1.1."""

    options: ClassVar[dict[str, Any]] = {"what": "classic", "mqtt": 311}


class NodeV1Shadow(NodeJudge):
    """SDK v1, thingShadow."""

    script, named, names_versions = "v1.js", False, False
    options: ClassVar[dict[str, Any]] = {"what": "shadow"}


class NodeV1Jobs(NodeJudge):
    """SDK v1, jobs."""

    script, named = "v1.js", False
    options: ClassVar[dict[str, Any]] = {"what": "jobs"}
