"""The ``generate`` of a directory that ``adaptspec export`` wrote."""

from __future__ import annotations

import os
import threading
from typing import Any

from adaptspec.decoder import load
from adaptspec.drop_in.directory import DirectoryError, read_settings
from adaptspec.drop_in.speed_up import SpeedUp

KEPT = "_adaptspec"  # the attribute of the model that keeps what decodes it

_loading = threading.Lock()  # two first calls at once load one draft model


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """What ``model.generate`` does for a model that was loaded from the directory.

    transformers binds it to the model and hands on what the caller gave, unprepared.
    The first call loads the draft model, heads and profiles that the directory names.

    Args:
        *args: As of transformers' ``generate``.
        model: The model, as ``from_pretrained(DIR, trust_remote_code=True)`` gave it.
        **kwargs: As of :class:`~adaptspec.drop_in.speed_up.SpeedUp`.

    Raises:
        DirectoryError: if the model wasn't loaded from such a directory.
        AdaptSpecError: where the draft model, heads or an argument can't be used.
    """
    return _sped_up(model)(*args, **kwargs)


def _sped_up(model: Any) -> SpeedUp:
    """What decodes the model; it lives as long as the model."""
    with _loading:
        kept = vars(model).get(KEPT)
        # A copied model has the plain generate there.
        if not isinstance(kept, SpeedUp):
            kept = _loaded(model)
            vars(model)[KEPT] = kept
    return kept


def _loaded(model: Any) -> SpeedUp:
    folder = model.name_or_path
    if not os.path.isdir(folder):
        raise DirectoryError(
            f"the exported directory must be where the model was loaded from, "
            f"{folder!r} isn't a directory in {os.getcwd()}: load it by its whole path"
        )
    settings = read_settings(folder)
    dtype = str(model.dtype).removeprefix("torch.")
    decoder = load(
        model,
        settings.draft_model,
        settings.db,
        # Where the caller asked for another type, the draft model follows.
        dtype="auto" if dtype == settings.dtype else dtype,
        heads=settings.heads,
        trust_remote_code=settings.trust_remote_code,
    )
    return SpeedUp(model, decoder)
