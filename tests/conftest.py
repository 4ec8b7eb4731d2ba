"""What every test may use."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# The contracts' own asserts explain themselves.
pytest.register_assert_rewrite("adaptspec.testing")

MOST_WORKERS = 4  # each takes up to 2 GiB of memory

# A busy machine is no failure, and every run tries the same examples.
hypothesis.settings.register_profile("adaptspec", deadline=None, derandomize=True)
hypothesis.settings.load_profile("adaptspec")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start processes go first: a long one at the end runs alone."""
    tests = Path(__file__).parent
    slow = [tests / "tuner", tests / "training", tests / "test_benchmarks.py"]
    items.sort(key=lambda item: not any(item.path.is_relative_to(s) for s in slow))


@pytest.fixture(scope="session")
def real_model_path() -> Path:
    """The embedded default model, for tests marked ``real_model``."""
    from adaptspec.default_model import default_model_path

    return Path(default_model_path())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A PostgreSQL server's URL without a database; skips where it isn't installed."""
    pytest.importorskip("psycopg", reason="needs the driver psycopg")
    from adaptspec.testing.databases import postgres_binaries
    from adaptspec.testing.databases import postgres_server as running

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
