"""A PostgreSQL server of the tests' own, gone when they end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USERS = ("postgres", "nobody")  # who may run it, if this is root
STARTS = 3  # another process may take the port meanwhile


def postgres_binaries() -> Path | None:
    """The folder of ``initdb``, ``pg_ctl`` and ``postgres``, None where there is none.

    Looked for in ``PATH`` and where Debian keeps them.
    """
    folders = [Path(name) for name in os.environ.get("PATH", "").split(os.pathsep)]
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(debian, key=lambda path: path.parent.name.zfill(4), reverse=True)
    needed = ("initdb", "pg_ctl", "postgres")
    return next(
        (f for f in folders if all(os.access(f / n, os.X_OK) for n in needed)), None
    )


@contextmanager
def postgres_server(binaries: Path) -> Iterator[str]:
    """Run a server on loopback; its URL without a database's name.

    Nothing is synced to disk. A superuser runs it as another user, as it demands.
    """
    asked: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="adaptspec-postgres-"))
    if os.geteuid() == 0:
        asked = _unprivileged()
        os.chown(folder, asked["user"], asked["group"])
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(binaries / name), *arguments],
            # A server that inherited a pipe would keep its reader waiting.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            text=True,
            **asked,
        )

    data, log = str(folder / "data"), folder / "log"
    try:
        made = run(
            *("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N"),
            *("-E", "UTF8", "--locale=C"),
        )
        made.check_returncode()
        for start in range(STARTS):
            port = _free_port()
            options = f"-F -h 127.0.0.1 -p {port} -k {folder} -c max_connections=60"
            begun = run(
                "pg_ctl", "-D", data, "-w", "-l", str(log), "-o", options, "start"
            )
            if begun.returncode == 0:
                break
            if start == STARTS - 1:
                raise RuntimeError(f"no PostgreSQL: {log.read_text()[-2000:]}")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}"
        finally:
            run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged() -> dict[str, Any]:
    import pwd

    for name in USERS:
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise RuntimeError(f"PostgreSQL refuses to run as root, and there is no {USERS}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
