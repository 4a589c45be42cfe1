"""`python -m access.example`: writes deploy/mosquitto/example/, which a test holds to the program.

What `starter.py broker setup` writes for a registry with one denied device, without the certificates.
"""

from pathlib import Path

from access.mosquitto import (
    DEVICE_ACL,
    ENGINE_ACL,
    MosquittoFiles,
    MosquittoListeners,
    canary_topic,
    config,
    device_acl,
    engine_acl,
)

FOLDER = Path(__file__).parent.parent / "deploy" / "mosquitto" / "example"
_THERE = Path("/etc/mosquitto/tidegate")


def example() -> dict[str, str]:
    """The files, by name."""
    files = MosquittoFiles(
        folder=_THERE / "access",
        certificate=_THERE / "broker.pem",
        private_key=_THERE / "broker.key",
        service_ca=_THERE / "ca.pem",
        pid_file=Path("/run/mosquitto/mosquitto.pid"),
        persistence=Path("/var/lib/mosquitto"),
    )
    listeners = MosquittoListeners(devices=8883, engine=8884, host="0.0.0.0")
    return {
        "mosquitto.conf": config(listeners, files, 256 * 1024),
        DEVICE_ACL: device_acl(["motor-7"]),
        ENGINE_ACL: engine_acl(canary_topic("mosquitto", "0f3a9d1c5b7e2846")),
    }


def main() -> None:
    """Write them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in example().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
