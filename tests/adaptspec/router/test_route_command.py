"""``adaptspec route`` as a program: it starts, says where, and ends gracefully."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adaptspec.cli import build_cli
from adaptspec.host import Host
from upstreams import (
    Conversation,
    Received,
    World,
    request_bytes,
    skip_without_packages,
)

skip_without_packages()

PROGRAM = "from adaptspec.cli import main; main()"


class Program:
    """The command in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "route", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "ADAPTSPEC_BLOCK_PLUGINS": "bundled,tuner,training"},
        )
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)", self.said)
        assert found, self.said + self.process.stderr.read()
        self.port = int(found[1])

    def ended(self) -> tuple[int, str]:
        """Exit code and what else it said."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def started() -> Iterator[list[Program]]:
    programs: list[Program] = []
    yield programs
    for program in programs:
        program.process.kill()
        program.process.communicate()


def table_file(tmp_path: Path, **table: Any) -> str:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    return str(path)


@pytest.mark.slow
def test_sigterm_lets_answers_end_and_takes_no_more(
    world: World, tmp_path: Path, started: list[Program]
) -> None:
    go = threading.Event()

    async def answer(request: Received, to: Conversation) -> None:
        await to.start()
        await to.piece(b"first")
        await world.loop.run_in_executor(None, go.wait)
        await to.piece(b"last")
        await to.end()

    url = world.server(answer).url
    path = table_file(tmp_path, servers={"a": url}, classes={"code": "a"}, default="a")
    program = Program(path, "--port", "0")
    started.append(program)
    assert "code -> a" in program.said
    assert "everything else -> a" in program.said
    assert "no classifier" in program.said
    address = ("127.0.0.1", program.port)
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(request_bytes(b"{}"))
        seen = b""
        while b"first" not in seen:
            seen += connection.recv(1000)
        program.process.send_signal(signal.SIGTERM)
        refused = False
        until = time.monotonic() + 60
        while not refused and time.monotonic() < until:
            try:
                socket.create_connection(address, timeout=1).close()
                time.sleep(0.05)
            except OSError:
                refused = True
        assert refused
        assert program.process.poll() is None
        go.set()
        while piece := connection.recv(1000):
            seen += piece
    assert seen.endswith(b"0\r\n\r\n")
    assert b"last" in seen
    assert program.ended() == (0, "")


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_word(
    world: World, tmp_path: Path, started: list[Program]
) -> None:
    url = world.server().url
    program = Program(table_file(tmp_path, servers={"a": url}, default="a"), "--port=0")
    started.append(program)
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=60)
    connection.request("POST", "/v1/completions", b"{}")
    assert connection.getresponse().read() == b"{}"
    connection.close()
    program.process.send_signal(signal.SIGINT)
    assert program.ended() == (130, "")


@pytest.mark.slow
def test_it_may_have_as_many_files_open_as_the_system_allows(
    world: World, tmp_path: Path, started: list[Program]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = table_file(tmp_path, servers={"a": world.server().url}, default="a")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] // 2, limits[1]))
    try:
        started.append(Program(path, "--port=0"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    pid = started[0].process.pid
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (limits[1], limits[1])


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(build_cli(Host({})), ["route", *arguments])
    return done.exit_code, done.output


def test_what_is_wrong_is_told_in_one_line(tmp_path: Path) -> None:
    good = table_file(tmp_path, servers={"a": "http://127.0.0.1:1"}, default="a")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            ([str(tmp_path / "none.json")], "can't be read"),
            ([good, "--port", port], "Address already in use; pass another"),
            ([good, "--host", "no such host."], "can't listen on no such host."),
            ([good, "--max-body", "big"], "--max-body must be a size"),
        ]
        for arguments, message in cases:
            code, said = run(*arguments)
            assert code == 1, said
            assert message in said
            assert said.startswith("Error: ")
            assert said.count("\n") == 1


def test_without_its_packages_the_command_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = table_file(tmp_path, servers={"a": "http://127.0.0.1:1"}, default="a")
    for name in [n for n in sys.modules if n.startswith("adaptspec.router.")]:
        if name != "adaptspec.router.table":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, said = run(good)
    assert code == 1
    assert "pip install 'adaptspec[router]'" in said


def test_a_sigterm_at_the_first_moment_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before uvicorn's own handlers stand."""
    import uvicorn

    from adaptspec.router.relay import Limits
    from adaptspec.router.serving import serve
    from adaptspec.router.table import RouteTable

    made: list[Any] = []
    config = uvicorn.Config

    def kept(*given: Any, **named: Any) -> Any:
        made.append(config(*given, **named))
        return made[-1]

    monkeypatch.setattr(uvicorn, "Config", kept)
    told: list[str] = []

    def ready(url: str) -> None:
        told.append(url)
        # Should the signal be lost, an interrupt ends the test, and it fails.
        watchdog.start()
        signal.raise_signal(signal.SIGTERM)

    watchdog = threading.Timer(20, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGTERM)
    table = {"servers": {"a": "http://127.0.0.1:1"}, "default": "a"}
    try:
        serve(RouteTable.model_validate(table), "127.0.0.1", 0, Limits(), ready=ready)
    except KeyboardInterrupt:
        pytest.fail("the signal was lost")
    finally:
        watchdog.cancel()
    assert len(told) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    # OpenAI's client keeps a connection for five seconds, as uvicorn does by itself.
    assert made[0].timeout_keep_alive > 60
