"""`starter.py ca`: made, shown, rolled over, retired, lists signed and written."""

import re
import stat
from pathlib import Path

import pytest
from cryptography import x509

from cli.output import ExitStatus
from models.identity import AuthorityKind
from tests.cli_runner import Ran, run


class Office:
    """A state directory and a database, and commands on them."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder = folder
        self.environment = {
            "TIDEGATE_STATE_DIR": str(folder),
            "TIDEGATE_DATABASE_URL": database_url,
            "TIDEGATE_ACTOR": "alice",
            "TIDEGATE_CA_DIR": str(folder / "ca"),
            "TIDEGATE_CA_PASSPHRASE_FILE": str(folder / "ca.passphrase"),
        }

    def ca(self, *words: object, **environment: str) -> Ran:
        return run("ca", *words, **{**self.environment, **environment})

    def ids(self) -> dict[tuple[str, str], str]:
        """Ids by kind and state."""
        return {(a["kind"], a["state"]): a["authority_id"] for a in self.ca("show", "--json").json["authorities"]}


@pytest.fixture
def office(tmp_path: Path, empty_database: str) -> Office:
    return Office(tmp_path, empty_database)


def test_init_makes_what_is_missing_and_keeps_it_encrypted(office: Office) -> None:
    ran = office.ca("init")
    assert ran.status == 0
    assert "made device, claim, service" in ran.err
    keys = list((office.folder / "ca").iterdir())
    assert len(keys) == 3
    assert all(b"ENCRYPTED" in key.read_bytes() and stat.S_IMODE(key.stat().st_mode) == 0o600 for key in keys)
    again = office.ca("init", "--json")
    assert again.json["made"] == []
    assert len(list((office.folder / "ca").iterdir())) == 3
    assert [a["kind"] for a in again.json["authorities"]] == list(AuthorityKind)


def test_init_without_settings_uses_the_state_directory(office: Office) -> None:
    environment = {key: value for key, value in office.environment.items() if "CA_" not in key}
    assert run("ca", "init", **environment).status == 0
    assert (office.folder / "ca.passphrase").exists()
    assert office.ca("roll", "device").status == 0, "what it made is what the settings name"


def test_show_lists_all_and_tells_everything_of_one_and_writes_who_is_believed(office: Office) -> None:
    nothing = office.ca("show")
    assert (nothing.status, nothing.out) == (0, "")
    assert "'ca init' makes them" in nothing.err
    office.ca("init")
    office.ca("roll", "device")
    shown = office.ca("show")
    assert shown.out.count("active") == 3
    assert shown.out.count("trusted") == 1
    bundle = office.folder / "devices.pem"
    assert office.ca("show", "--kind", "device", "--out", bundle).status == 0
    named, of_kind = (
        re.sub(r" \d+d ", " ", office.ca("show", *asked).out) for asked in (["device"], ["--kind", "device"])
    )
    assert named == of_kind, "but for the days left, of which one may end in between"
    assert len(x509.load_pem_x509_certificates(bundle.read_bytes())) == 2
    one = office.ids()["device", "active"]
    assert one in office.ca("show", one[:16]).out
    assert office.ca("show", "nonsense").status == ExitStatus.USAGE


def test_a_roll_over_and_the_retirement_of_the_old(office: Office) -> None:
    office.ca("init")
    old = office.ids()["device", "active"]
    announced = office.ca("roll", "device", "--announce", "--json").json
    assert announced["state"] == "trusted"
    assert office.ids()["device", "active"] == old
    refused = office.ca("retire", old)
    assert refused.status == ExitStatus.REFUSED
    assert "makes its successor first" in refused.err
    rolled = office.ca("roll", "device", "--json").json
    assert (rolled["authority_id"], rolled["state"]) == (announced["authority_id"], "active")
    retired = office.ca("retire", old[:20], "--reason", "rolled over", "--json").json
    assert (retired["state"], retired["certificates_revoked"]) == ("retired", 0)


def test_lists_are_signed_and_written_as_a_broker_reads_them(office: Office) -> None:
    office.ca("init")
    office.ca("roll", "device")
    file = office.folder / "crl.pem"
    signed = office.ca("crl", "--sign", "--out", file, "--json").json["crls"]
    assert [crl["number"] for crl in signed] == [2, 2]
    assert file.read_bytes().count(b"BEGIN X509 CRL") == 2
    assert "Tidegate device CA" in office.ca("crl").out


def test_without_keys_what_needs_them_says_which_setting(office: Office, tmp_path: Path) -> None:
    office.ca("init")
    none = {"TIDEGATE_CA_DIR": "", "TIDEGATE_CA_PASSPHRASE_FILE": ""}
    environment = {**office.environment, **none}
    for name in none:
        environment.pop(name)
    ran = run("ca", "roll", "device", **environment)
    assert ran.status != 0
    assert "TIDEGATE_CA_DIR" in ran.err
    lost = office.ca("crl", "--sign", TIDEGATE_CA_DIR=str(tmp_path / "elsewhere"))
    assert lost.status != 0
    assert "made on another machine, or is lost" in lost.err
    assert office.ca("crl").status == 0, "to look at them takes no key"


def test_a_duration_that_is_none_is_refused(office: Office) -> None:
    office.ca("init")
    ran = office.ca("roll", "device", "--within", "soon")
    assert ran.status != 0
    assert "--within" in ran.err
