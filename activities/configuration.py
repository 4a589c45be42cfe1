"""The steps of a configuration that touch PostgreSQL or the broker. Each is idempotent; its docstring says by what."""

from dataclasses import dataclass

from temporalio import activity

from activities.lifecycle import ConfigurationRecords
from activities.rollout_records import NoticePublisher
from models.lifecycle import (
    ConfigurationSeen,
    EndConfigurationInput,
    HintConfigurationInput,
    WantConfigurationInput,
    WantedConfiguration,
)
from models.protocol import config_topic


@dataclass
class ConfigurationActivities:
    """Collaborators: what is wanted of devices, and a way to tell them."""

    records: ConfigurationRecords
    publisher: NoticePublisher

    @activity.defn
    async def want_configuration(self, asked: WantConfigurationInput) -> WantedConfiguration:
        """Write what the device is to run. Idempotent: what is wanted already is not a version more.

        Raises NotFoundError, RefusedError (retired, barred) and InvalidInputError (not a configuration).
        """
        return await self.records.want(asked)

    @activity.defn
    async def hint_configuration(self, asked: HintConfigurationInput) -> ConfigurationSeen:
        """Tell the device what differs, unless it has said meanwhile that nothing does. May be sent any number of times."""
        difference = await self.records.difference(asked.device_id, asked.version)
        if difference is None:
            return ConfigurationSeen(applied=True)
        await self.publisher.publish(config_topic(asked.device_id, "update", "delta"), difference)
        return ConfigurationSeen(applied=False)

    @activity.defn
    async def end_configuration(self, asked: EndConfigurationInput) -> ConfigurationSeen:
        """Wait no longer. Idempotent: a wait that is forgotten stays so."""
        return ConfigurationSeen(applied=await self.records.end(asked))
