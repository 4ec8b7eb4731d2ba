"""Server processes of other engines: started on loopback, watched, and ended.

None is left behind: not on a normal exit, an exception, Ctrl-C or SIGTERM, and not
after ``kill -9`` of this process either (:mod:`adaptspec.engines.watcher` ends it then,
with all that it started).
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptspec.errors import EngineError

HOST = "127.0.0.1"
PORTS_TRIED = 3
POLL_SECONDS = 0.05
TAIL_LINES = 6
TAIL_CHARACTERS = 800


class ServerProcess:
    """A server that runs, with its log; made by :func:`start_server`.

    Args:
        name: What errors call it.
        command: The program and its arguments.
        port: Where it will listen.
        environment: All its variables; None: those of this process.
        grace: Seconds that it has to end by itself before it is killed.

    Attributes:
        pid: The server's, which leads a process group of its own.

    Raises:
        EngineError: where the program can't be started.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        environment: Mapping[str, str] | None = None,
        grace: float = 5.0,
    ) -> None:
        if os.name != "posix":
            raise EngineError(
                f"{name}: servers are started on Linux and macOS alone; start it "
                "yourself and measure its address with `--engine URL`"
            )
        self.name = name
        self.command = tuple(command)
        self.port = port
        self._grace = grace
        self._owner = os.getpid()
        self._returncode: int | None = None
        self._stopped = False
        # Requests of several threads ask how it ended, which is told once.
        self._reading = threading.RLock()
        # It has no name in the file system, so that nothing of it can be left there.
        self._log = tempfile.TemporaryFile()
        self._watcher = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("watcher.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
        atexit.register(self.stop)
        try:
            self.pid = self._hand_over(environment)
        except BaseException:
            self.stop()
            raise

    def _hand_over(self, environment: Mapping[str, str] | None) -> int:
        assert self._watcher.stdin is not None
        told = {
            "command": self.command,
            "environment": dict(os.environ if environment is None else environment),
            "grace": self._grace,
        }
        with contextlib.suppress(BrokenPipeError):
            self._watcher.stdin.write(json.dumps(told).encode() + b"\n")
            self._watcher.stdin.flush()
        news = self._news()
        if "pid" not in news:
            raise EngineError(
                f"{self.name}: can't start {self.command[0]!r}: "
                f"{news.get('error') or 'its watcher ended'}{self.tail()}"
            )
        return int(news["pid"])

    def _news(self) -> dict[str, Any]:
        """The watcher's next line; empty where it ended."""
        assert self._watcher.stdout is not None
        line = self._watcher.stdout.readline()
        return dict(json.loads(line)) if line else {}

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    @property
    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""
        return self._ended_within(0.0)

    def _ended_within(self, seconds: float) -> str | None:
        with self._reading:
            if self._stopped:
                return "it was stopped"
            if self._returncode is None:
                assert self._watcher.stdout is not None
                if not select.select([self._watcher.stdout], [], [], seconds)[0]:
                    return None
                self._returncode = int(self._news().get("returncode", -signal.SIGKILL))
            return how_it_ended(self._returncode)

    def check(self, wait: float = 0.0, matching: str = "") -> None:
        """Raise where it has ended.

        Args:
            matching: Lines of its log that tell why, as :meth:`tail` takes it.
            wait: Seconds that it may still take to: a connection that broke is seen
                a moment before the end of who broke it.

        Raises:
            EngineError: how it ended, and what it printed last.
        """
        if (ended := self._ended_within(wait)) is not None:
            raise EngineError(f"{self.name} ended: {ended}{self.tail(matching)}")

    def tail(self, matching: str = "") -> str:
        """What it printed last, to be put behind a message.

        Args:
            matching: Lines that match this expression alone, wherever they are; all
                where none does.
        """
        if self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        start = 0 if matching else max(0, size - 16 * TAIL_CHARACTERS)
        # Not by `read`: the place in the file is shared with the server, which writes.
        printed = os.pread(self._log.fileno(), size - start, start)
        lines = [line.strip() for line in printed.decode(errors="replace").splitlines()]
        lines = [line for line in lines if line]
        lines = [line for line in lines if re.search(matching, line)] or lines
        last = " | ".join(lines[-TAIL_LINES:])
        if len(last) > TAIL_CHARACTERS:
            last = "..." + last[-TAIL_CHARACTERS:]
        return f"; it printed last: {last}" if last else "; it printed nothing"

    def listens(self) -> bool:
        """Whether it, or a process that it started, is who listens at its port."""
        import psutil  # type: ignore[import-untyped]

        try:
            server = psutil.Process(self.pid)
            family = [server, *server.children(recursive=True)]
            return any(
                c.status == psutil.CONN_LISTEN and c.laddr.port == self.port
                for process in family
                for c in process.net_connections("tcp")
            )
        except psutil.AccessDenied:  # can't be told; its health was asked already
            return True
        except psutil.NoSuchProcess:
            return False

    def memory(self) -> int:
        """Bytes that it and its children hold alone; mapped files don't count."""
        import psutil

        total = 0
        with contextlib.suppress(psutil.Error):
            server = psutil.Process(self.pid)
            for process in (server, *server.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    held = process.memory_info()
                    total += held.rss - getattr(held, "shared", 0)
        return total

    def stop(self) -> None:
        """End it and all that it started; again is allowed."""
        if self._stopped or os.getpid() != self._owner:
            return
        self._stopped = True
        atexit.unregister(self.stop)
        watcher = self._watcher
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            watcher.stdin.close()
        try:
            watcher.wait(timeout=2 * self._grace + 20)
        except subprocess.TimeoutExpired:
            watcher.kill()
            watcher.wait()
        if watcher.returncode != 0 and hasattr(self, "pid"):
            # The watcher itself was killed, so its work is left to do.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        with self._reading:
            watcher.stdout.close()
        self._log.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def start_server(
    name: str,
    command: Callable[[int], Sequence[str]],
    *,
    health: str = "/health",
    deadline: float = 300.0,
    environment: Mapping[str, str] | None = None,
    grace: float = 5.0,
    free_port: Callable[[], int] | None = None,
    telling: str = "",
) -> ServerProcess:
    """A server that is ready to answer, on a free port of loopback.

    Args:
        name: What errors call it.
        command: Port -> the program and its arguments.
        health: A path that answers with status 200 when the server is ready.
        deadline: Seconds that it has until then.
        environment: All its variables; None: those of this process.
        grace: Seconds that it has to end by itself before it is killed.
        free_port: Where ports come from; None: the operating system.
        telling: Lines of its log that match this expression tell why it ended, where
            there are any.

    Raises:
        EngineError: in one line with the tail of its log, where it can't be started,
            ended before it was ready, or was not ready in time.
    """
    ports = []
    for _ in range(PORTS_TRIED):
        ports.append(port := (free_port or find_free_port)())
        server = ServerProcess(name, command(port), port, environment, grace)
        try:
            if _wait_until_ready(server, health, deadline, telling):
                return server
        except BaseException:
            server.stop()
            raise
        server.stop()
    raise EngineError(
        f"{name}: other programs took every port before it could: {ports}; try again"
    )


def _wait_until_ready(
    server: ServerProcess, health: str, deadline: float, telling: str
) -> bool:
    """False where another program took the port in between."""
    until = time.monotonic() + deadline
    while server.ended is None:
        if _is_healthy(server.port, health):
            # Who answers may be another program, while this one still loads.
            if server.listens():
                return True
            if server.ended is None:
                return False
        if time.monotonic() > until:
            raise EngineError(
                f"{server.name} was not ready within {deadline:g} s{server.tail()}"
            )
        time.sleep(POLL_SECONDS)
    if _is_taken(server.port):
        return False
    raise EngineError(
        f"{server.name} ended before it was ready: {server.ended}{server.tail(telling)}"
    )


def find_free_port() -> int:
    """A port of loopback that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _is_healthy(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def how_it_ended(returncode: int) -> str:
    """An exit status in words."""
    if returncode >= 0:
        return f"exit code {returncode}"
    if returncode == -signal.SIGKILL:
        return "killed, perhaps for want of memory"
    try:
        return f"ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"ended by signal {-returncode}"
