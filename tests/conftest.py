"""What every test may use."""

from __future__ import annotations

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
