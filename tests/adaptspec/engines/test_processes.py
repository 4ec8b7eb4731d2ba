"""Server processes are watched, and none outlives who started it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from adaptspec.engines.processes import (
    ServerProcess,
    find_free_port,
    how_it_ended,
    start_server,
)
from adaptspec.errors import EngineError

pytestmark = pytest.mark.slow

# A server: `python -c HEALTHY PORT` answers 200 everywhere.
HEALTHY = """
import http.server, sys
print("it listens", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), type("H", (
    http.server.BaseHTTPRequestHandler,), {
    "do_GET": lambda self: (self.send_response(200), self.end_headers()),
    "log_message": lambda *a: None})).serve_forever()
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HEALTHY
# The grandchild leaves the group and ignores requests; its pid goes to a file.
GRANDCHILD = """
import os, signal, sys, time
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(1000)
"""
PARENTS = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {GRANDCHILD!r}, sys.argv[2]])
{HEALTHY}
"""
STARTER = """
import json, os, sys, time
from adaptspec.engines.processes import start_server
script, pid_file, how = sys.argv[1:]
command = lambda port: [sys.executable, "-c", script, str(port), pid_file]
server = start_server("fake", command, grace=0.2)
while not os.path.exists(pid_file):
    time.sleep(0.01)
if how == "fork":
    if os.fork() == 0:
        time.sleep(20)  # holds the pipe to the watcher open
        os._exit(0)
print(json.dumps([server.pid, server._watcher.pid]), flush=True)
if how == "raise":
    raise ValueError("a bug")
if how != "return":
    time.sleep(1000)
"""


def command(script: str, *more: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-c", script, str(port), *more]


def start(script: str, *more: str, grace: float = 5.0) -> ServerProcess:
    return start_server("fake", command(script, *more), grace=grace, deadline=60)


def is_gone(pid: int) -> bool:
    """Within 30 seconds; a zombie that nobody collects is gone too."""
    try:
        process = psutil.Process(pid)
        for _ in range(3000):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.01)
    except psutil.NoSuchProcess:
        return True
    return False


def read_when_there(path: Path) -> int:
    while not path.exists():
        time.sleep(0.01)
    return int(path.read_text())


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        yield other.getsockname()[1]


def test_a_server_is_ready_when_it_is_returned_and_gone_when_it_is_stopped() -> None:
    with start(HEALTHY) as server:
        assert server.ended is None
        assert server.listens()
        assert server.memory() > 1_000_000
        assert "it listens" in server.tail()
        with socket.create_connection(("127.0.0.1", server.port)):
            pass
    assert is_gone(server.pid)
    assert server.ended == "it was stopped"
    server.stop()


def test_its_descendants_go_with_it_also_those_that_left_its_group(
    tmp_path: Path,
) -> None:
    with start(PARENTS, str(tmp_path / "pid"), grace=0.2) as server:
        grandchild = read_when_there(tmp_path / "pid")
        assert psutil.pid_exists(grandchild)
    assert is_gone(server.pid)
    assert is_gone(grandchild)


def test_what_a_dead_server_left_is_ended(tmp_path: Path) -> None:
    with start(PARENTS, str(tmp_path / "pid"), grace=0.2) as server:
        grandchild = read_when_there(tmp_path / "pid")
        os.kill(server.pid, signal.SIGKILL)
        assert is_gone(grandchild)
        with pytest.raises(EngineError, match="fake ended: killed, perhaps for want"):
            server.check()


def test_a_server_that_ignores_the_request_is_killed() -> None:
    with start(DEAF, grace=0.2) as server:
        pass
    assert is_gone(server.pid)


def test_the_environment_is_what_is_told() -> None:
    script = 'import os\nprint("colour", os.environ.get("COLOUR"))\n' + HEALTHY
    environment = {**os.environ, "COLOUR": "blue"}
    with start_server("fake", command(script), environment=environment) as server:
        assert "colour blue" in server.tail()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            'import sys; print("no such option"); sys.exit(3)',
            r"fake ended before it was ready: exit code 3; .* last: no such option",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            "killed, perhaps for want of memory; it printed nothing",
        ),
        ("import os; os.abort()", "ended by SIGABRT"),
    ],
)
def test_one_that_ends_while_it_starts_says_how(script: str, says: str) -> None:
    with pytest.raises(EngineError, match=says) as caught:
        start(script)
    assert "\n" not in str(caught.value)


def test_lines_that_tell_why_are_found_wherever_they_are() -> None:
    script = (
        'print("why: no memory"); [print("x" * 99) for _ in range(999)]\n'
        "raise SystemExit(1)"
    )
    for telling, says in (("^why", r"last: why: no memory$"), ("^no", r"x{99}$")):
        with pytest.raises(EngineError, match=says):
            start_server("fake", command(script), telling=telling)


def test_one_that_never_gets_ready_is_ended() -> None:
    pids: list[int] = []
    script = 'import os, time; print("pid", os.getpid(), flush=True); time.sleep(1000)'
    with pytest.raises(EngineError, match=r"not ready within 1 s.*pid (\d+)") as caught:
        start_server("fake", command(script), deadline=1.0)
    pids.append(int(str(caught.value).rsplit(" ", 1)[1]))
    assert is_gone(pids[0])


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineError, match=r"can't start '/no/such'.*No such file"):
        start_server("fake", lambda port: ["/no/such", str(port)])


def test_a_port_that_was_taken_in_between_is_left_for_another(taken_port: int) -> None:
    ports = iter([taken_port, find_free_port()])
    server = start_server("fake", command(HEALTHY), free_port=lambda: next(ports))
    with server:
        assert server.port != taken_port


def test_another_programs_answer_is_not_taken_for_ours() -> None:
    """The other one is healthy, and ours is still on its way to the same port."""
    slow = "import time; time.sleep(1)\n" + HEALTHY
    with start(HEALTHY) as other:
        ports = iter([other.port, find_free_port()])
        with start_server("fake", command(slow), free_port=lambda: next(ports)) as ours:
            assert ours.port != other.port
            assert ours.listens()


def test_without_any_port_it_gives_up(taken_port: int) -> None:
    with pytest.raises(EngineError, match=f"took every port.*{taken_port}"):
        start_server("fake", command(HEALTHY), free_port=lambda: taken_port)


def test_a_long_log_is_cut_to_its_end() -> None:
    script = (
        'print("first"); [print("line", i, "x" * 300) for i in range(2000)]\n'
        'print("last words"); raise SystemExit(1)'
    )
    with pytest.raises(EngineError, match=r"last words$") as caught:
        start(script)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("how", ["return", "raise", "SIGTERM", "SIGINT", "SIGKILL"])
def test_nothing_outlives_who_started_it(how: str, tmp_path: Path) -> None:
    check_that_nothing_outlives(how, how, tmp_path)


def test_nothing_outlives_it_though_a_fork_of_it_lives_on(tmp_path: Path) -> None:
    check_that_nothing_outlives("fork", "SIGKILL", tmp_path)


def check_that_nothing_outlives(mode: str, how: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, PARENTS, str(pid_file), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(temporary)},
        text=True,
    )
    assert starter.stdout is not None
    server, watcher = map(int, starter.stdout.readline().strip("[]\n").split(","))
    grandchild = read_when_there(pid_file)
    if how.startswith("SIG"):
        assert psutil.pid_exists(server)
        os.kill(starter.pid, signal.Signals[how])
    starter.wait(timeout=30)
    starter.stdout.close()
    assert [is_gone(pid) for pid in (server, watcher, grandchild)] == [True] * 3
    assert list(temporary.iterdir()) == []


def test_a_killed_watcher_takes_the_server_with_it() -> None:
    with start(HEALTHY) as server:
        os.kill(server._watcher.pid, signal.SIGKILL)
        server._watcher.wait()
        assert server.ended is not None
    assert is_gone(server.pid)


def test_endings_are_told_in_words() -> None:
    assert how_it_ended(2) == "exit code 2"
    assert how_it_ended(-signal.SIGSEGV) == "ended by SIGSEGV"
    assert how_it_ended(-99) == "ended by signal 99"


def test_threads_that_ask_together_are_told_the_same_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are held where each has seen that there is news, unless one waits."""
    both = threading.Barrier(2)
    really = select.select

    def held(*arguments: Any) -> Any:
        seen = really(*arguments)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)
        return seen

    ends = 'import sys; print("last words", flush=True); sys.stdin.read(); sys.exit(3)'
    with ServerProcess("fake", [sys.executable, "-c", ends], 1) as server:
        monkeypatch.setattr(select, "select", held)
        with ThreadPoolExecutor(2) as pool:
            told = list(pool.map(lambda _: server._ended_within(30), range(2)))
        assert told == ["exit code 3"] * 2
