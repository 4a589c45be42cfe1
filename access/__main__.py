"""`python -m access`: keeps one Mosquitto in step with who may speak. One for each broker, on the broker's machine.

It has to be allowed to write the broker's folder (TIDEGATE_ACCESS_FOLDER) and to signal the broker's process
(TIDEGATE_ACCESS_PID_FILE), and connects to the engine's listener with the certificate `engine.access`.
"""

import argparse
import asyncio
import signal
import sys

import structlog

from access.folder import BrokerFolder
from access.keeper import AccessKeeper
from models.errors import InvalidInputError, TidegateError
from models.settings import Settings
from observe import logs, metrics
from store.brokers import BrokerStore
from store.engine import Database

log = structlog.get_logger("access")


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    if not settings.database_url or not settings.mqtt_url or not settings.access_folder or not settings.access_pid_file:
        raise InvalidInputError(
            "the access keeper needs TIDEGATE_DATABASE_URL, TIDEGATE_MQTT_URL (the engine's listener, with "
            "TIDEGATE_MQTT_CA, TIDEGATE_MQTT_CERTIFICATE and TIDEGATE_MQTT_PRIVATE_KEY), TIDEGATE_ACCESS_FOLDER and "
            "TIDEGATE_ACCESS_PID_FILE"
        )
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    port = metrics.serve(settings.metrics_host, settings.access_metrics_port)
    db = Database(settings.database_url, max_size=2)
    await db.open(timeout=30)
    folder = BrokerFolder(settings.access_folder)
    keeper = AccessKeeper(BrokerStore(db), settings, folder, settings.access_pid_file, settings.access_broker_id)
    metrics.mark_ready("access")
    log.info("ready", metrics_port=port, broker=settings.mqtt_url, folder=str(folder.path))
    try:
        await keeper.keep(stop)
    finally:
        metrics.mark_ready("access", False)
        await db.close()
    log.info("stopped")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m access",
        description="Keeps one Mosquitto's ACL, revocation list and sessions in step with who may speak. Settings come "
        "from TIDEGATE_... variables and from the state directory of a running stack (docs/reference.md).",
    )
    parser.parse_args()
    settings = Settings().with_endpoints()
    logs.configure("access", settings)
    try:
        asyncio.run(serve(settings))
    except TidegateError as error:
        log.error("access keeper stopped", error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
