"""The folder of AdaptSpec's caches: fetched models and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "ADAPTSPEC_CACHE"


def cache_root() -> Path:
    """The absolute cache folder, not created; ADAPTSPEC_CACHE overrides the user's own.

    A leading ``~`` is the home folder, and a relative path starts at the working
    folder.

    Raises:
        OSError: if the home folder of ``~name`` isn't known.
    """
    if override := os.environ.get(CACHE_VARIABLE):
        try:
            return Path(override).expanduser().resolve()
        except RuntimeError as error:
            raise OSError(f"{CACHE_VARIABLE}={override}: {error}") from error
    from platformdirs import user_cache_path

    return user_cache_path("adaptspec")
