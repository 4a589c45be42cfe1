"""Settings: one table, read from the environment (`TIDEGATE_...`), filled from a running embedded stack.

An address that is set means: that server is somebody else's, do not start one. What is not set is taken from
`endpoints.json` in the state directory, which `starter.py up` writes when all of the stack answers.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Endpoints(BaseModel):
    """`endpoints.json`: where the pieces of a stack answer; null where a piece does not apply."""

    mqtt_host: str | None = None
    mqtt_port: int | None = None
    ca: str | None = None
    """CA file that devices check broker and enrolment server with; None: the devices' listener speaks plain MQTT."""
    engine_mqtt_url: str | None = None
    """Where gateway and workers connect, with `service_certificate`; None: the devices' listener serves them too."""
    open_mqtt_url: str | None = None
    """A listener on loopback without identity, for simulated fleets; only where it was asked for."""
    enrolment_url: str | None = None
    ca_dir: str | None = None
    ca_passphrase_file: str | None = None
    service_ca: str | None = None
    service_certificate: str | None = None
    service_private_key: str | None = None
    database_url: str | None = None
    temporal_address: str | None = None
    ui_url: str | None = None
    artifact_url: str | None = None
    artifact_store: str | None = None
    order_key: str | None = None
    metrics: dict[str, str] = Field(default_factory=dict)


class Settings(BaseSettings):
    """Every setting. `docs/reference.md` is generated from the descriptions below."""

    model_config = SettingsConfigDict(env_prefix="TIDEGATE_", env_file=None, extra="ignore")

    state_dir: Path = Field(default=Path(".tidegate"), description="Directory of the embedded stack's state.")
    database_url: str | None = Field(default=None, description="PostgreSQL, as postgresql://user@host:port/name.")
    temporal_address: str | None = Field(default=None, description="Temporal frontend, as host:port.")
    temporal_namespace: str = Field(default="default", description="Temporal namespace.")
    mqtt_url: str | None = Field(default=None, description="MQTT broker, as mqtt://host:port or mqtts://host:port.")
    mqtt_ca: Path | None = Field(default=None, description="CA file for mqtts.")
    mqtt_certificate: Path | None = Field(default=None, description="Client certificate of gateway and worker.")
    mqtt_private_key: Path | None = Field(default=None, description="Key of that certificate.")
    artifact_url: str | None = Field(default=None, description="Base URL from which devices download.")
    artifact_store: str | None = Field(
        default=None, description="Where artifacts are kept: file:///path or s3://bucket/prefix."
    )
    order_key: Path | None = Field(
        default=None,
        description="Online Ed25519 key (PEM) that signs orders; made on first use in the state directory.",
    )
    order_lifetime_seconds: int = Field(default=86400, ge=60, description="How long an order to one device is valid.")
    metrics_host: str = Field(default="127.0.0.1", description="Address of the Prometheus endpoints.")
    worker_metrics_port: int = Field(default=0, description="Port of the worker's metrics; 0 picks a free one.")
    worker_temporal_metrics_port: int = Field(
        default=0, description="Port of the Temporal client's own metrics in the worker; 0 picks a free one."
    )
    ca_dir: Path | None = Field(
        default=None,
        description="Folder with the encrypted keys of the certificate authorities; workers that have it sign.",
    )
    ca_passphrase_file: Path | None = Field(default=None, description="File with the passphrase of those keys.")
    certificate_days: int = Field(default=90, ge=1, le=90, description="Life of a device certificate.")
    crl_hours: int = Field(
        default=168,
        ge=1,
        description="Life of a revocation list; it is signed anew long before, and on every revocation.",
    )
    rotation_overlap_hours: int = Field(
        default=24, ge=1, description="How long a device's old and new certificate may both be valid."
    )
    enrolment_url: str | None = Field(
        default=None, description="Base URL of the enrolment server, as https://host:port."
    )
    enrolment_host: str = Field(default="127.0.0.1", description="Address on which the enrolment server listens.")
    enrolment_port: int = Field(
        default=0, description="Port on which the enrolment server listens; 0 picks a free one."
    )
    enrolment_certificate: Path | None = Field(
        default=None, description="Server certificate (PEM chain) of the enrolment server."
    )
    enrolment_private_key: Path | None = Field(default=None, description="Key of that certificate.")
    enrolment_wait_seconds: float = Field(
        default=10.0, ge=0, description="How long an enrolment request is held before it is answered with 202."
    )
    enrolment_hook_url: str | None = Field(
        default=None, description="Asked before each enrolment; anything but a clear yes within five seconds is a no."
    )
    enrolment_metrics_port: int = Field(
        default=0, description="Port of the enrolment server's metrics; 0 picks a free one."
    )
    access_folder: Path | None = Field(
        default=None,
        description="Folder with the ACL and revocation list of the Mosquitto that 'python -m access' keeps.",
    )
    access_pid_file: Path | None = Field(default=None, description="Process id file of that Mosquitto.")
    access_broker_id: str = Field(default="mosquitto", description="Name of that broker in the registry.")
    access_metrics_port: int = Field(default=0, description="Port of the access keeper's metrics; 0 picks a free one.")
    redis_url: str | None = Field(
        default=None,
        description="Cache for looking up devices, as redis://host:port/0; without it PostgreSQL is asked.",
    )
    offline_minutes: float = Field(
        default=10.0, gt=0, description="How long a device may be silent before it counts as offline; types may differ."
    )
    heartbeat_days: int = Field(default=30, ge=1, description="How long the history of heartbeats is kept.")
    shadow_history_days: int = Field(default=30, ge=1, description="How long the history of shadows is kept.")
    quarantine_days: int = Field(default=30, ge=1, description="How long messages that could not be used are kept.")
    notify_file: Path | None = Field(
        default=None, description="YAML file with the channels that alerts are told to (docs/alerts.md)."
    )
    gateway_metrics_port: int = Field(default=0, description="Port of the gateway's metrics; 0 picks a free one.")
    log_format: Literal["console", "json"] = Field(default="console", description="console or json.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Least level logged.")
    gateway_batch_milliseconds: int = Field(default=20, ge=0, description="How long a batch gathers messages.")
    gateway_batch_messages: int = Field(default=2000, ge=1, description="Most messages in one batch.")
    gateway_queue_messages: int = Field(default=50_000, ge=1, description="Messages held before backpressure.")

    def with_endpoints(self) -> "Settings":
        """These settings, with what is not set taken from `<state_dir>/endpoints.json` where that file exists."""
        path = self.state_dir / "endpoints.json"
        if not path.exists():
            return self
        found = Endpoints.model_validate(json.loads(path.read_text()))
        fills: dict[str, object] = {}
        files = {"ca_dir": found.ca_dir, "ca_passphrase_file": found.ca_passphrase_file}
        for name in ("database_url", "temporal_address", "artifact_url", "artifact_store", "enrolment_url"):
            if getattr(self, name) is None:
                fills[name] = getattr(found, name)
        if self.mqtt_url is None and (found.engine_mqtt_url or found.mqtt_host):
            scheme = "mqtts" if found.ca else "mqtt"
            fills["mqtt_url"] = found.engine_mqtt_url or f"{scheme}://{found.mqtt_host}:{found.mqtt_port}"
            files |= {
                "mqtt_ca": found.service_ca or found.ca,
                "mqtt_certificate": found.service_certificate,
                "mqtt_private_key": found.service_private_key,
            }
        for name, file in files.items():
            if getattr(self, name) is None and file:
                fills[name] = Path(file)
        if self.order_key is None and found.order_key:
            fills["order_key"] = Path(found.order_key)
        return self.model_copy(update=fills)
