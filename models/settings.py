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
        for name in ("database_url", "temporal_address", "artifact_url", "artifact_store"):
            if getattr(self, name) is None:
                fills[name] = getattr(found, name)
        if self.mqtt_url is None and found.mqtt_host:
            scheme = "mqtts" if found.ca else "mqtt"
            fills["mqtt_url"] = f"{scheme}://{found.mqtt_host}:{found.mqtt_port}"
            fills["mqtt_ca"] = self.mqtt_ca or (Path(found.ca) if found.ca else None)
        if self.order_key is None and found.order_key:
            fills["order_key"] = Path(found.order_key)
        return self.model_copy(update=fills)
