"""What every test may use."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The contracts' own asserts explain themselves.
pytest.register_assert_rewrite("adaptspec.testing")

MOST_WORKERS = 4  # each takes up to 2 GiB of memory

# What takes seconds to import. None of it starts a thread, so processes fork safely.
WARM = [
    "adaptspec_tuner.tune",
    "adaptspec_training.trainer",
    "adaptspec_profiles.sql",
    "optuna",
    "psutil",
    "pytest",
    "sqlalchemy.dialects.sqlite",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
]

# A test run in a shell's background ignores Ctrl-C, and so would what it starts.
PROLOGUE = """
import os, signal
os.environ.clear()
os.environ.update(environment)
for stream, path in (1, out), (2, told):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""

CALL = """
import sys
from importlib import util
spec = util.spec_from_file_location("under_test", file)
module = sys.modules["under_test"] = util.module_from_spec(spec)
spec.loader.exec_module(module)
getattr(module, function)(*arguments)
"""

# A busy machine is no failure, and every run tries the same examples.
hypothesis.settings.register_profile("adaptspec", deadline=None, derandomize=True)
hypothesis.settings.load_profile("adaptspec")

# Tests neither read nor write the database that a user's programs have.
os.environ.pop("ADAPTSPEC_DB", None)

# Test processes beside each other share the cores; torch would take all for each.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Folders are shared out; for files and names no worker's start is worth it."""
    named = ("keyword", "lf", "collectonly")
    if any(config.getoption(name, None) for name in named):
        return 0
    if not all(Path(argument).is_dir() for argument in config.args):
        return 0
    return min(os.cpu_count() or 1, MOST_WORKERS)


# Whoever uses one of these starts a process or a server.
STARTS_PROCESSES = {"fork", "postgres_server", "serve", "start_writer"}


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes; slow ones go first: one at the end runs alone."""
    for item in items:
        if STARTS_PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


class Forked:
    """A process of its own without the seconds of imports, used as a ``Popen`` is."""

    def __init__(
        self, program: str, folder: Path, environment: Mapping[str, str], **values: Any
    ) -> None:
        self._out, self._told = folder / "stdout", folder / "stderr"
        given = {
            **values,
            "environment": {**os.environ, **environment},
            "out": str(self._out),
            "told": str(self._told),
        }
        self._process = multiprocessing.get_context("forkserver").Process(
            target=exec, args=(PROLOGUE + program, given)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended."""
        self.wait(timeout)
        out, told = (
            path.read_text() if path.exists() else ""
            for path in (self._out, self._told)
        )
        return out, told

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # the server waits at once
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self.kill()
        self.wait()
        self._process.close()


@pytest.fixture(autouse=True)
def drafts_in_every_step(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafting saves no time on tiny models: the guard would pass most steps over."""
    if request.node.get_closest_marker("guarded") is None:
        from adaptspec.decoder import Decoder
        from adaptspec.decoding.engine import Engine

        for cls in (Engine, Decoder):
            *others, guard = cls.__init__.__defaults__ or ()
            assert guard is True
            monkeypatch.setattr(cls.__init__, "__defaults__", (*others, False))


@pytest.fixture(scope="session")
def _warm_server() -> None:
    """What processes are forked from; it ends with this process.

    What is read from the environment at an import must be said before: the number of
    threads, and what :func:`adaptspec.cli.main` sets.
    """
    paths = [str(Path(p or ".").resolve()) for p in sys.path]
    forkserver.set_forkserver_preload(WARM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        forkserver.ensure_running()


@pytest.fixture
def fork(
    _warm_server: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Forked]]:
    """Runs a program's text in a process that has these names and variables of the
    environment; what still runs is killed at the end."""
    started: list[Forked] = []

    def fork(
        program: str, environment: Mapping[str, str] | None = None, **values: Any
    ) -> Forked:
        folder = tmp_path_factory.mktemp("process")
        started.append(Forked(program, folder, environment or {}, **values))
        return started[-1]

    yield fork
    for process in started:
        process.close()


@pytest.fixture
def fork_call(fork: Callable[..., Forked]) -> Callable[..., Forked]:
    """Calls a test file's function with these arguments in a process."""

    def fork_call(function: Callable[..., None], *arguments: Any) -> Forked:
        return fork(
            CALL,
            file=function.__code__.co_filename,
            function=function.__name__,
            arguments=arguments,
        )

    return fork_call


@pytest.fixture(scope="session")
def real_model_path() -> Path:
    """The embedded default model, for tests marked ``real_model``."""
    from adaptspec.default_model import default_model_path

    return Path(default_model_path())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A PostgreSQL server's URL without a database; skips where it isn't installed."""
    pytest.importorskip("psycopg", reason="needs the driver psycopg")
    from postgres import postgres_binaries
    from postgres import postgres_server as running

    if (binaries := postgres_binaries()) is None:
        pytest.skip("needs PostgreSQL's server (initdb, pg_ctl, postgres)")
    with running(binaries) as url:
        yield url


@pytest.fixture
def new_postgres_database(postgres_server: str) -> Callable[[], str]:
    """Makes empty databases; their URLs."""
    import psycopg

    def create() -> str:
        name = f"test_{uuid.uuid4().hex}"
        server = f"{postgres_server}/postgres"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"{postgres_server}/{name}"

    return create


@pytest.fixture
def postgres_url(new_postgres_database: Callable[[], str]) -> str:
    """The URL of an empty database."""
    return new_postgres_database()


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Handing tiny products to a second thread costs more than it saves."""
    torch = sys.modules.get("torch")
    if torch is None or request.node.get_closest_marker("real_model"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
