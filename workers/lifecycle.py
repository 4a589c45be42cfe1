"""The activities of devices' lives, with their collaborators; and their workflows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from temporalio.client import Client

from activities.configuration import ConfigurationActivities
from activities.decommission import DecommissionActivities
from activities.diagnostics import DiagnosticActivities
from activities.fleet_rotation import FleetRotationActivities
from activities.rotation import RotationActivities
from activities.shadow import ShadowActivities
from models.settings import Settings
from store.configuring import ConfiguringStore
from store.decommission import DecommissionStore
from store.diagnostics import DiagnosticStore
from store.engine import Database
from store.rotation import RotationStore
from store.shadow_syncing import ShadowSyncStore
from transport.publisher import Publisher
from transport.retained import RetainedMessages
from workflows.configuration import ConfigurationWorkflow
from workflows.decommission import DecommissionWorkflow
from workflows.diagnostic import DiagnosticWorkflow
from workflows.fleet_rotation import FleetRotationWorkflow
from workflows.lifecycle_client import TemporalFlows
from workflows.rotation import CertificateRotationWorkflow
from workflows.shadow_sync import ShadowSyncWorkflow


@dataclass(frozen=True)
class Lifecycle:
    """The activities of devices' lives."""

    configuration: ConfigurationActivities
    rotation: RotationActivities
    decommission: DecommissionActivities
    fleet: FleetRotationActivities
    shadow: ShadowActivities
    diagnostics: DiagnosticActivities

    @classmethod
    def of(cls, db: Database, client: Client, publisher: Publisher, settings: Settings) -> "Lifecycle":
        """With their collaborators."""
        certificates, flows = RotationStore(db), TemporalFlows(client)
        return cls(
            ConfigurationActivities(ConfiguringStore(db), publisher),
            RotationActivities(certificates, publisher),
            DecommissionActivities(DecommissionStore(db), flows, publisher, RetainedMessages(settings)),
            FleetRotationActivities(certificates, flows),
            ShadowActivities(ShadowSyncStore(db), publisher),
            DiagnosticActivities(DiagnosticStore(db), publisher),
        )

    @property
    def short(self) -> list[Callable[..., Any]]:
        """Of one transaction, or a few seconds at most."""
        configuration, rotation, decommission = self.configuration, self.rotation, self.decommission
        diagnostics = self.diagnostics
        return [
            configuration.want_configuration,
            configuration.hint_configuration,
            configuration.end_configuration,
            rotation.look_at_certificates,
            rotation.ask_for_rotation,
            rotation.settle_rotation,
            rotation.give_up_rotation,
            rotation.revert_rotation,
            self.shadow.want_shadow,
            self.shadow.check_shadow,
            self.shadow.end_shadow,
            decommission.begin_decommission,
            decommission.stop_flows,
            decommission.ask_to_wipe,
            decommission.retire_device,
            decommission.clear_retained,
            decommission.alert_retained_left,
            decommission.end_decommission,
            diagnostics.open_question,
            diagnostics.publish_question,
            diagnostics.end_question,
            diagnostics.look_at_boot,
        ]

    @property
    def lasting(self) -> list[Callable[..., Any]]:
        """Those that wait or pace, and beat."""
        return [self.decommission.await_brokers, self.fleet.rotate_fleet]


LIFECYCLE_WORKFLOWS: list[type] = [
    ConfigurationWorkflow,
    CertificateRotationWorkflow,
    DecommissionWorkflow,
    FleetRotationWorkflow,
    ShadowSyncWorkflow,
    DiagnosticWorkflow,
]
