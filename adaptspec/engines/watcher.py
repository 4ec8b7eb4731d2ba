"""Run as a program of its own: keeps a server, and ends it with whoever started it.

The starter writes what to run to standard input, as one line of JSON, and holds the
pipe open. When the pipe closes, whatever closed it (``kill -9`` too), the server and
all that it started are ended. Standard output has one line of JSON when the server was
started and another when it has ended; standard error is the server's log.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

PARENT_LOOK_SECONDS = 1.0
KILL_SECONDS = 10.0


def main() -> None:
    """Start the server of the first line, and stay until it has ended."""
    starter = os.getppid()
    told = json.loads(sys.stdin.readline())
    die_with_parent = _linux_calls()
    try:
        server = subprocess.Popen(
            told["command"],
            env=told["environment"],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    except (OSError, ValueError) as error:
        _tell(error=str(error))
        return
    _tell(pid=server.pid)
    threading.Thread(
        target=_end_with, args=(starter, server.pid, told["grace"]), daemon=True
    ).start()
    returncode = server.wait()
    _tell(returncode=returncode)
    end_all(server.pid, told["grace"])  # what it started and left


def _tell(**news: Any) -> None:
    with contextlib.suppress(OSError):  # nobody may be left to read it
        print(json.dumps(news), flush=True)


def _end_with(starter: int, leader: int, grace: float) -> None:
    """Wait until the starter closes its pipe or is gone, then end everything.

    A process forked from the starter holds the pipe open too, hence the second look.
    """
    while os.getppid() == starter:
        readable, _, _ = select.select([sys.stdin], [], [], PARENT_LOOK_SECONDS)
        if readable:
            break
    end_all(leader, grace)


def end_all(leader: int, grace: float) -> None:
    """End the group of ``leader`` and all descendants of this process.

    Args:
        grace: Seconds between asking them (SIGTERM) and killing them.
    """
    import psutil  # type: ignore[import-untyped]

    me = psutil.Process()
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, KILL_SECONDS)):
        members = me.children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, number)
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.send_signal(number)
        psutil.wait_procs(members, timeout=seconds)
        if not me.children(recursive=True):
            return


def _linux_calls() -> Callable[[], None] | None:
    """Adopt what the server's children leave; a call for the server to die with us.

    Linux alone has both; elsewhere the server's process group is all that is ended.
    """
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    set_parent_death_signal, set_child_subreaper = 1, 36  # of <linux/prctl.h>
    libc = ctypes.CDLL(None)
    libc.prctl(set_child_subreaper, 1, 0, 0, 0)
    return lambda: libc.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    main()
