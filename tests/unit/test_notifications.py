"""What notifications say, whom they are for, and that no secret is in them."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import apprise
import orjson
import pytest

from activities.channels import Channel, load_channels
from activities.notifying import _through_apprise, body_of
from domain.notifications import MAX_NAMED, compose, in_words
from models.alerting import AlertEvent, NotedAlert, NotifyInput, Severity
from models.errors import NotFoundError, SpecError, TidegateError
from tests.cli_runner import run

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"


def alert(number: int, site: str | None = "berlin", severity: Severity = Severity.WARNING) -> NotedAlert:
    at = NOON + timedelta(minutes=number)
    return NotedAlert(
        alert_no=number, subject=f"motor-{number}", text=f"motor-{number} is hot", severity=severity, at=at, site=site
    )


def told(alerts: list[NotedAlert], event: AlertEvent = AlertEvent.OPENED) -> NotifyInput:
    return compose("d" * 32, "overheating", event, alerts, NOON)


def test_many_devices_are_one_sentence() -> None:
    alerts = [alert(n, "hamburg" if n % 12 == 0 else "berlin") for n in range(87, 0, -1)]
    made = told(alerts)
    assert made.summary == "87 devices: overheating; sites berlin 80, hamburg 7; first motor-1 at 12:01 UTC"
    assert (made.count, made.sites) == (87, {"berlin": 80, "hamburg": 7})
    assert [each.subject for each in made.alerts] == [f"motor-{n}" for n in range(1, MAX_NAMED + 1)]
    assert told([alert(2)]).summary == "motor-2: overheating at 12:02 UTC"
    resolved = told([alert(2), alert(3)], AlertEvent.RESOLVED)
    assert resolved.summary == "2 devices: overheating resolved; site berlin 2; first motor-2 at 12:02 UTC"
    of_lists = told([alert(1, None), alert(2, None)])
    assert of_lists.summary == "2 alerts: overheating; first motor-1 at 12:01 UTC"
    many = in_words("x", AlertEvent.OPENED, [(f"m{n}", f"site-{n}", NOON) for n in range(14)])
    assert many.endswith("and 4 more; first m0 at 12:00 UTC")


def test_a_notification_matters_as_much_as_the_worst_alert_in_it() -> None:
    assert told([alert(1), alert(2, severity=Severity.CRITICAL)]).severity is Severity.CRITICAL


def test_a_webhook_s_body_is_what_the_documentation_says() -> None:
    body = orjson.loads(body_of(told([alert(n) for n in range(1, 26)])))
    assert (body["type"], body["timestamp"]) == ("alert.opened", "2026-11-24T12:00:00+00:00")
    assert set(body["data"]) == {"digest", "rule", "event", "severity", "summary", "count", "sites", "alerts", "more"}
    assert (body["data"]["count"], len(body["data"]["alerts"]), body["data"]["more"]) == (25, 20, 5)
    assert set(body["data"]["alerts"][0]) == {"alert_no", "subject", "text", "severity", "at", "site"}


def channel(**given: Any) -> Channel:
    return Channel.model_validate(
        {"name": "ops", "kind": "webhook", "url": "https://hooks.example/path-secret", "secret": SECRET} | given
    )


def test_a_channel_takes_what_it_was_made_for() -> None:
    opened, critical = told([alert(1)]), told([alert(1, severity=Severity.CRITICAL)])
    assert channel().wants(opened)
    assert not channel(min_severity="critical").wants(opened) and channel(min_severity="critical").wants(critical)
    assert not channel(rules={"exclude": ["overheating"]}).wants(opened)
    assert not channel(rules={"include": ["device-offline"]}).wants(opened)
    assert channel(rules={"include": ["overheating"]}).wants(opened)
    assert not channel().wants(told([alert(1)], AlertEvent.ACKNOWLEDGED))
    assert channel(events=["acknowledged"]).wants(told([alert(1)], AlertEvent.ACKNOWLEDGED))


def write(folder: Path, *channels: dict[str, Any], **rest: Any) -> Path:
    path = folder / "notify.yaml"
    path.write_text(json.dumps({"channels": list(channels), **rest}))
    path.chmod(0o600)
    return path


OPS = {"name": "ops", "kind": "webhook", "url": "https://hooks.example/path-secret", "secret": SECRET}
MAIL = {"name": "mail", "kind": "apprise", "url": "mailtos://user:pass-secret@example.com"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"url": "ftp://x/path-secret"}, "expected http://... or https://..."),
        ({"secret": "pass-secret"}, "expected whsec_ and 24 to 64 bytes"),
        ({"secret": "whsec_c2hvcnQ="}, "expected whsec_ and 24 to 64 bytes"),
        ({"secret": None}, "expected whsec_ and 24 to 64 bytes"),
        ({"secrets": "pass-secret"}, "channels.0.secrets: Extra inputs"),
        ({"name": "a b"}, "expected letters, digits"),
        ({"kind": "pigeon"}, "channels.0.kind"),
        ({"kind": "apprise"}, "expected none for apprise"),
        ({"min_severity": "awful"}, "channels.0.min_severity"),
    ],
)
def test_a_mistake_in_the_file_is_told_without_the_value_which_may_be_a_secret(
    tmp_path: Path, changed: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SpecError) as refused:
        load_channels(write(tmp_path, OPS | changed))
    assert expected in str(refused.value)
    assert "pass-secret" not in repr(refused.value) and "path-secret" not in repr(refused.value)
    assert refused.value.__cause__ is None and refused.value.__context__ is None


def test_what_is_no_file_of_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_channels(tmp_path / "missing.yaml")
    with pytest.raises(SpecError, match="its own name"):
        load_channels(write(tmp_path, OPS, OPS))
    for text in (b"channels: [{secret: pass-secret, ", b"\xff", b"[]", b"channels: 7", b"a: &a [*a]"):
        (tmp_path / "notify.yaml").write_bytes(text)
        with pytest.raises(TidegateError) as refused:
            load_channels(tmp_path / "notify.yaml")
        assert "pass-secret" not in repr(refused.value)


def test_the_list_of_channels_shows_nothing_that_is_secret(tmp_path: Path) -> None:
    path = write(tmp_path, OPS, MAIL | {"min_severity": "critical", "rules": {"include": ["overheating"]}})
    for json_flag in ([], ["--json"]):
        ran = run("alert", "channel", "list", *json_flag, TIDEGATE_NOTIFY_FILE=str(path))
        assert ran.status == 0 and "https://hooks.example/..." in ran.out and "mailtos://..." in ran.out
        assert "secret" not in ran.out + ran.err and SECRET not in ran.out
    missing = run("alert", "channel", "list", TIDEGATE_STATE_DIR=str(tmp_path))
    assert missing.status == 2 and "TIDEGATE_NOTIFY_FILE" in missing.err


def test_what_a_device_has_said_is_one_line_of_a_notification() -> None:
    said = "motor-1 refused to reboot: \n\ncritical site-offline: all of berlin\x1b[2J\u202e" + "\n" * 400
    [shown] = told([alert(1).model_copy(update={"text": said})]).alerts
    assert shown.text.isprintable() and shown.text.startswith("motor-1 refused to reboot: \\n\\ncritical")
    assert len(shown.text) == 300


def sent_by_mail(monkeypatch: pytest.MonkeyPatch, address: str, text: str) -> tuple[str, str]:
    """The body that a mail channel sends, and as what, as apprise hands them to the channel."""
    sent: list[tuple[str, str]] = []

    def send(self: Any, body: str, *_: Any, body_format: Any = None, **__: Any) -> bool:
        sent.append((body, str(self.resolve_format(body_format).value)))
        return True

    monkeypatch.setattr("apprise.plugins.email.NotifyEmail.send", send)
    assert _through_apprise(address, told([alert(1).model_copy(update={"text": text})]))
    return sent[0]


ADDRESS, SPY = "mailto://user:password@example.com", 'refused: <img src="http://spy.example/x">'
IMGHDR = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
"""Imported by one of the channels that apprise looks through."""


@IMGHDR
def test_what_a_device_has_said_is_no_html_in_a_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sent_by_mail(monkeypatch, ADDRESS, SPY)[1] == "text"
    body, kind = sent_by_mail(monkeypatch, f"{ADDRESS}?format=html", SPY)
    assert kind == "html" and "<img" not in body and "spy.example" in body


@IMGHDR
def test_without_being_told_that_it_is_text_the_mail_would_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = apprise.Apprise.notify

    def notify(self: Any, *arguments: Any, body_format: Any = None, **options: Any) -> Any:
        return real(self, *arguments, **options)

    monkeypatch.setattr(apprise.Apprise, "notify", notify)
    body, kind = sent_by_mail(monkeypatch, ADDRESS, SPY)
    assert kind == "html" and "<img" in body
