"""``adaptspec.json``: what was measured of trained heads, beside their weights."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptspec.errors import HeadsLoadError

if TYPE_CHECKING:
    from adaptspec.heads.medusa import MedusaHeads

CALIBRATION = "adaptspec.json"
KIND = "medusa"
FILE_VERSION = 1

Paths = tuple[tuple[tuple[int, ...], float], ...]
Ranks = tuple[tuple[float, ...], ...]


def read_calibration(
    folder: Path, fingerprint: str, heads: MedusaHeads
) -> tuple[Paths | None, Ranks | None] | None:
    """Paths and ranks measured of ``heads``; None if there is no such file.

    Raises:
        HeadsLoadError: if it is damaged or was written for other weights.
    """
    path = folder / CALIBRATION
    found = read_json(path)
    if found is None:
        return None
    if (found.get("version"), found.get("kind")) != (FILE_VERSION, KIND):
        raise HeadsLoadError(
            f"{path}: version {FILE_VERSION} and kind {KIND!r} are read, "
            f"got {found.get('version')!r} and {found.get('kind')!r}"
        )
    if found.get("weights", fingerprint) != fingerprint:
        raise HeadsLoadError(
            f"{path} was measured with other weights than those beside it (writing "
            "them was interrupted?); train or copy the heads again, or delete the file "
            "to do without a calibrated tree"
        )
    try:
        return _paths(found.get("paths"), heads), _ranks(found.get("ranks"), heads)
    except ValueError as error:
        raise HeadsLoadError(
            f"{path}: {error}; delete the file to do without a calibrated tree"
        ) from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``, None if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise HeadsLoadError(f"can't read {path}: {error}") from error
    if not isinstance(found, dict):
        raise HeadsLoadError(f"{path} must hold a JSON object")
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace ``path`` at once."""
    text = json.dumps(value, indent=1, sort_keys=False) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _paths(value: Any, heads: MedusaHeads) -> Paths | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError("paths must be a list")
    seen: set[tuple[int, ...]] = {()}
    paths = []
    for item in value:
        if not (
            isinstance(item, list)
            and len(item) == 2
            and isinstance(item[0], list)
            and all(_is_rank(rank, heads) for rank in item[0])
            and _is_chance(item[1])
        ):
            raise ValueError(f"a path must be [[ranks], chance], got {item!r}")
        path = tuple(item[0])
        if not 1 <= len(path) <= len(heads.blocks):
            raise ValueError(
                f"a path must have 1..{len(heads.blocks)} ranks, got {item!r}"
            )
        if path in seen or path[:-1] not in seen:
            raise ValueError(f"paths must come once, after their beginning: {item!r}")
        seen.add(path)
        paths.append((path, float(item[1])))
    return tuple(paths)


def _ranks(value: Any, heads: MedusaHeads) -> Ranks | None:
    if value is None:
        return None
    if not (
        isinstance(value, list)
        and len(value) == len(heads.blocks)
        and all(isinstance(row, list) and row for row in value)
        and all(_is_chance(chance) for row in value for chance in row)
    ):
        raise ValueError(
            f"ranks must be {len(heads.blocks)} lists of chances, one for each head"
        )
    return tuple(tuple(float(chance) for chance in row) for row in value)


def _is_rank(value: Any, heads: MedusaHeads) -> bool:
    return type(value) is int and 0 <= value < heads.draft_vocab


def _is_chance(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 <= value <= 1.0
