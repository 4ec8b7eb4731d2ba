"""Whether our kernels can be compiled here."""

from __future__ import annotations

import pytest

from adaptspec.acceleration import native


def available() -> bool:
    """Whether there is a native kernel."""
    try:
        native.kernel()
    except native.NativeUnavailableError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not available(), reason="no native kernel here")
