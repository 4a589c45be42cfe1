"""nats-server as the stack runs it: who has no certificate of ours stays out; who has one is confined by nothing."""

import asyncio
import ssl
from datetime import UTC, datetime
from pathlib import Path

import aiomqtt
import pytest

from access.mosquitto import ACCESS, GATEWAY, MosquittoListeners
from devstack.nats import NatsServer
from devstack.stack import EmbeddedStack
from models.settings import Settings
from store.engine import Database
from tests.integration.access_setup import Credentials, Stage


def client(port: int, who: Credentials | None, ca: Path) -> aiomqtt.Client:
    context = who.context() if who else ssl.create_default_context(cafile=str(ca))
    name = who.name.replace(".", "@") if who else "nobody"
    return aiomqtt.Client(
        "127.0.0.1", port, identifier=name, tls_context=context, timeout=5, protocol=aiomqtt.ProtocolVersion.V311
    )


async def test_nats_server_asks_for_a_certificate_of_ours_and_confines_nobody(tmp_path: Path) -> None:
    async with EmbeddedStack(
        tmp_path / "state", settings=Settings(), broker="nats", worker=False, gateway=False, enrolment=False
    ) as stack:
        port, ca = stack.endpoints.mqtt_port, Path(str(stack.endpoints.ca))
        assert port and stack.endpoints.engine_mqtt_url == f"mqtts://127.0.0.1:{port}"
        assert isinstance(stack.supervisor.pieces[-1], NatsServer), "no access keeper: it would have nothing to keep"
        db = Database(str(stack.endpoints.database_url))
        await db.open()
        signer = await signer_of(stack, db, tmp_path)
        victim, attacker, claim = await signer.device("victim"), await signer.device("attacker"), signer.claim()
        for stranger in (claim, None, await signer.authority_of_a_stranger()):
            with pytest.raises((aiomqtt.MqttError, OSError)):
                async with client(port, stranger, ca):
                    pass
        tls = Path(str(stack.endpoints.ca)).parent
        service = Credentials(GATEWAY, tls / f"{GATEWAY}.pem", tls / f"{GATEWAY}.key", ca)
        async with client(port, service, ca) as engine, client(port, victim, ca), client(port, attacker, ca) as other:
            await engine.subscribe("devices/+/heartbeat")
            await asyncio.sleep(0.2)
            await other.publish("devices/victim/heartbeat", "spoofed", qos=1)
            async with asyncio.timeout(5):
                message = await anext(aiter(engine.messages))
            assert bytes(message.payload) == b"spoofed", "this is what nats-server does not prevent, as we say"
        await db.close()


async def signer_of(stack: EmbeddedStack, db: Database, folder: Path) -> Stage:
    """Certificates of the stack's own CAs."""
    from models.identity import AuthorityKind
    from pki.authority import Authority, read_certificate
    from pki.signer import key_store
    from store.authorities import AuthorityStore

    settings = Settings(
        ca_dir=Path(str(stack.endpoints.ca_dir)), ca_passphrase_file=Path(str(stack.endpoints.ca_passphrase_file))
    )
    keys, made = key_store(settings), Stage(db, folder, MosquittoListeners(0, 0), lambda text: text)
    for kind in AuthorityKind:
        view = await AuthorityStore(db).active(kind)
        made.authorities[kind.value] = Authority(read_certificate(view.certificate), keys.open(view.key_reference))
    (folder / "ca.pem").write_text(Path(str(stack.endpoints.ca)).read_text())  # noqa: ASYNC240
    assert made.authorities["service"].certificate.not_valid_after_utc > datetime.now(UTC)
    assert ACCESS
    return made
