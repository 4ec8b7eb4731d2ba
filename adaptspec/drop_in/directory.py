"""Writes a model directory whose ``generate`` decodes through AdaptSpec.

transformers runs ``custom_generate/generate.py`` of a directory in place of its own
``generate`` where ``from_pretrained`` is given ``trust_remote_code=True``. What is
written there only names :func:`adaptspec.drop_in.exported.generate`; everything that it
needs to know is in ``adaptspec/settings.json`` beside it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter, ValidationError

from adaptspec._version import __version__
from adaptspec.classes.classifier import KEY as CLASSIFIER
from adaptspec.errors import AdaptSpecError
from adaptspec.model.hardware_costs import COSTS_RECORD, costs_owner
from adaptspec.model.loading import load_model
from adaptspec.profile import OURS

if TYPE_CHECKING:
    from adaptspec.host import Host
    from adaptspec.model.language_model import LanguageModel
    from adaptspec.profile import Environment, ProfileStore

SETTINGS = "adaptspec/settings.json"
INSIDE = "./"  # how the settings mark what lies in the directory itself
OWN = ("adaptspec", "custom_generate")  # folders that the export writes
TEMPLATES = "additional_chat_templates"  # the one folder that tokenizers read

GENERATE = '''\
"""Decodes through AdaptSpec. Written by `adaptspec export`."""

from adaptspec.drop_in.exported import generate

__all__ = ["generate"]
'''


class DirectoryError(AdaptSpecError, OSError):
    """A directory can't be written, or isn't one that ``adaptspec export`` wrote."""


@dataclass(frozen=True)
class Settings:
    """What decoding in a directory needs to find again.

    Args:
        draft_model: A folder or hub name; None: no draft model.
        heads: Folders of trained heads.
        db: Path or URL of the profile database; None: the user's own where it runs.
        dtype: Of the target's weights as they are stored, such as ``bfloat16``.
        trust_remote_code: Whether code that comes with the draft model may run.
        files: Names in the directory that the export wrote.
        format: Of this file.
    """

    draft_model: str | None
    heads: Sequence[str]
    db: str | None
    dtype: str
    trust_remote_code: bool
    files: Sequence[str]
    format: Literal["adaptspec-directory-1"] = "adaptspec-directory-1"


def read_settings(folder: str | Path) -> Settings:
    """The settings of a directory, what lies inside it by its whole path.

    Raises:
        DirectoryError: if it has none, or they are damaged or another version's.
    """
    path = Path(folder) / SETTINGS
    try:
        found = TypeAdapter(Settings).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DirectoryError(
            f"{path} must hold the settings of an exported directory: "
            f"{_first(error)}; write the directory anew with `adaptspec export`"
        ) from None

    def whole(name: str) -> str:
        inside = name.startswith(INSIDE)
        return str(Path(folder).absolute() / name) if inside else name

    return replace(
        found,
        draft_model=found.draft_model and whole(found.draft_model),
        heads=[whole(one) for one in found.heads],
        db=found.db and whole(found.db),
    )


def _first(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])) + f": {first['msg']}"


def export_directory(
    folder: str | Path,
    model: str,
    draft_model: str | None = None,
    heads: Sequence[str | Path] = (),
    db: str | None = None,
    *,
    host: Host,
    copy: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Settings, int]:
    """Write a directory that ``from_pretrained`` reads and that decodes faster.

    The models are loaded once, so that what doesn't fit is found here.

    Args:
        folder: Where to; new, empty, or with ``force`` one with files in it.
        model: A model folder or hub name.
        draft_model: The same for the draft.
        heads: Folders of heads trained for the model.
        db: Path or SQLAlchemy URL of the profile database; None: the user's own.
        copy: Whether weights, draft model, heads and profiles are copied into the
            directory, so that it can be moved; else it refers to where they are.
        force: Whether files of the same names and an earlier export are replaced.
            Other files stay.

    Returns:
        What was written, and how many profiles of the model there are.

    Raises:
        DirectoryError: if it can't be written so.
        ModelLoadError: if a model can't be loaded.
        HeadsLoadError: if heads don't fit.
        ProfileStoreError: if the database can't be read.
    """
    folder = Path(folder)
    target = load_model(model, accelerate=False, trust_remote_code=trust_remote_code)
    source = _folder_of(model)
    if (source / SETTINGS).exists():
        raise DirectoryError(
            f"{source} was written by `adaptspec export` itself; give the model that "
            "it was made from"
        )
    if (source / "custom_generate").exists():
        raise DirectoryError(
            f"{source} has a custom_generate of its own, which can't be kept beside "
            "ours; give a model without one"
        )
    for one in heads:
        target.attach(host.open_heads(one, target))
    if draft_model is not None:
        load_model(draft_model, accelerate=False, trust_remote_code=trust_remote_code)
    files = _model_files(source)
    _check_place(folder, [*files, *_local([draft_model, *heads, db])], force)
    written = (*OWN, *(file.name for file in files))
    with _store(host, db) as store, _written(folder, written, force):
        for file in files:
            _place(file, folder / file.name, copy)
        own = folder / "adaptspec"
        own.mkdir()
        if draft_model is not None and copy:
            _copy_files(_folder_of(draft_model), own / "draft")
        if copy:
            for number, one in enumerate(heads, 1):
                _place(Path(one), own / f"heads-{number}", copy)
        count = _count(store, target)
        if copy and store is not None:
            inner = host.open_store(str(own / "profiles.db"))
            with contextlib.closing(inner):
                copy_profiles(store, inner, target)
        settings = Settings(
            draft_model=_referred(draft_model, "adaptspec/draft", copy),
            heads=[
                _referred(str(one), f"adaptspec/heads-{number}", copy) or ""
                for number, one in enumerate(heads, 1)
            ],
            db=f"{INSIDE}adaptspec/profiles.db"
            if copy and store is not None
            else _database(db, store),
            dtype=str(target.dtype).removeprefix("torch."),
            trust_remote_code=trust_remote_code,
            files=written,
        )
        text = json.dumps(asdict(settings), indent=2)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
        custom = folder / "custom_generate"
        custom.mkdir()
        needed = f"adaptspec>={__version__}\n"
        (custom / "requirements.txt").write_text(needed, encoding="utf-8")
        (custom / "generate.py").write_text(GENERATE, encoding="utf-8")
    return settings, count


def copy_profiles(
    source: ProfileStore, target: ProfileStore, model: LanguageModel
) -> None:
    """Copy what was measured and decided for a model, in any type of its weights."""
    profiles = [p for p in source.profiles() if _of(p.environment, model)]
    choices = [c for c in source.choices() if _of(c.environment, model)]
    target.add_profiles(profiles)
    target.put_choices(choices)
    owners = {p.run: CLASSIFIER for p in profiles}
    owners |= {c.run: CLASSIFIER for c in choices}
    owners |= {costs_owner(p.environment): COSTS_RECORD for p in profiles}
    for owner, key in owners.items():
        if (record := source.record(owner, key)) is not None:
            target.put_record(owner, key, record)


def _of(environment: Environment, model: LanguageModel) -> bool:
    same = environment.model == model.digest or environment.model_name == model.name
    return same and environment.engine == OURS


def _count(store: ProfileStore | None, model: LanguageModel) -> int:
    found = [] if store is None else store.profiles()
    return sum(_of(profile.environment, model) for profile in found)


@contextlib.contextmanager
def _store(host: Host, db: str | None) -> Iterator[ProfileStore | None]:
    """The store to refer to; None where none is named and no plugin opens one."""
    if db is None and not host.opens_stores:
        yield None
        return
    with contextlib.closing(host.open_store(db)) as store:
        yield store


def _database(db: str | None, store: ProfileStore | None) -> str | None:
    """How the settings name a database that stays where it is."""
    if db is None or store is None:
        return None
    if "***" in store.url:
        raise DirectoryError(
            f"{store.url} needs a password, which would lie open in the directory; "
            "copy the profiles into it with --copy, or set ADAPTSPEC_DB where it runs"
        )
    path = _database_file(db)
    return db if path is None else str(path.absolute())


def _database_file(db: str) -> Path | None:
    """The file of an SQLite database that is given by its path or a plain URL."""
    name = db.removeprefix("sqlite:///")
    return None if "://" in name or "?" in name else Path(name)


def _folder_of(model: str) -> Path:
    """Where the files of a model folder or of a hub name in the cache are."""
    if Path(model).is_dir():
        return Path(model).absolute()
    from transformers.utils.hub import cached_file

    found = cached_file(model, "config.json", local_files_only=True)
    return Path(str(found)).parent


def _model_files(source: Path) -> list[Path]:
    """What ``from_pretrained`` may read of a model folder."""
    return sorted(
        path
        for path in source.iterdir()
        if not path.name.startswith(".") and (path.is_file() or path.name == TEMPLATES)
    )


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir()
    for file in _model_files(source):
        _place(file, target / file.name, True)


def _place(source: Path, target: Path, copy: bool) -> None:
    """A copy of a file or folder, or a link to it."""
    if copy and source.is_dir():
        shutil.copytree(source, target)
    elif copy:
        shutil.copy2(source, target)
    else:
        try:
            target.symlink_to(source, target_is_directory=source.is_dir())
        except OSError as error:
            raise DirectoryError(
                f"{target} can't be a link to {source}: {error.strerror or error}; "
                "copy the files with --copy"
            ) from None


def _referred(name: str | None, inside: str, copy: bool) -> str | None:
    """How the settings name a model or heads."""
    if name is None:
        return None
    if copy:
        return INSIDE + inside
    return str(Path(name).absolute()) if Path(name).exists() else name


def _local(names: Sequence[str | Path | None]) -> list[Path]:
    """Those that are paths here."""
    found = (
        _database_file(name) if isinstance(name, str) else name
        for name in names
        if name is not None
    )
    return [path for path in found if path is not None and path.exists()]


def _check_place(folder: Path, sources: Sequence[Path], force: bool) -> None:
    """Refuse a place that holds what the directory is made from, or others' files."""
    if folder.exists() and not folder.is_dir():
        raise DirectoryError(f"{folder} must be a directory or new; it is a file")
    place = folder.resolve()
    for source in sources:
        real = source.resolve()
        if real.is_relative_to(place):
            raise DirectoryError(
                f"{folder} holds {real}, which the directory is made from; "
                "write to another place"
            )
        if source.is_dir() and place.is_relative_to(real):
            raise DirectoryError(
                f"{folder} lies in {real}, which the directory is made from; "
                "write to another place"
            )
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise DirectoryError(
            f"{folder} must be empty or new; it has files in it: write to another "
            "place, or replace them with --force"
        )


@contextlib.contextmanager
def _written(folder: Path, names: Sequence[str], force: bool) -> Iterator[None]:
    """Inside, names are written that nothing has; an error leaves none of them."""
    earlier: Sequence[str] = ()
    if force and (folder / SETTINGS).exists():
        with contextlib.suppress(DirectoryError):
            earlier = read_settings(folder).files
    folder.mkdir(parents=True, exist_ok=True)
    _remove(folder, [*earlier, *names])
    try:
        yield
    except BaseException:
        _remove(folder, names)
        raise


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Remove files, links and folders of these names; what links lead to stays."""
    for name in dict.fromkeys(Path(name).name for name in names):
        path = folder / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
