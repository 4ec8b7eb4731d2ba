"""What every test may use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# The contracts' own asserts explain themselves.
pytest.register_assert_rewrite("adaptspec.testing")


# A busy machine is no failure, and every run tries the same examples.
hypothesis.settings.register_profile("adaptspec", deadline=None, derandomize=True)
hypothesis.settings.load_profile("adaptspec")


@pytest.fixture(scope="session")
def real_model_path() -> Path:
    """The embedded default model, for tests marked ``real_model``."""
    from adaptspec.default_model import default_model_path

    return Path(default_model_path())


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
