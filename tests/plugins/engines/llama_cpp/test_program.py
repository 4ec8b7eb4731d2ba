"""What an installed program is and can do, by what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptspec.errors import EngineError
from adaptspec_plugins.engines.llama_cpp.program import Program, devices_of, options_of


@pytest.mark.slow
def test_version_options_and_types_are_found(fake: object) -> None:
    program = Program.find(fake.command)  # type: ignore[attr-defined]
    assert program.version == "4321 (abcdef0)"
    assert {"-m", "--model", "-md", "--model-draft", "--cache-ram"} <= program.options
    assert "--not-an-option" not in program.options  # of a description
    assert "--spec-ngram-map-k-size-n" not in program.options  # removed
    assert "--spec-ngram-map-k-size-m" in program.options
    assert "ngram-cache" in program.spec_types
    assert program.devices == ()


@pytest.mark.slow
def test_a_program_of_the_users_home_is_found(
    fake: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell puts a home in place of the ``~`` of ``llama.cpp=~/...``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Program.find("~/llama-server").command == fake.command  # type: ignore[attr-defined]


def test_options_with_many_names_and_values_are_found() -> None:
    text = (
        "-C,    --cpu-mask M     a mask\n"
        "                        (--inner is no option)\n"
        "--no-mmap               no map\n"
        "-ngl,  --gpu-layers, --n-gpu-layers N\n"
        "                        layers\n"
        "--draft, --draft-max N  the argument has been removed. use --other\n"
    )
    names = {"-C", "--cpu-mask", "--no-mmap", "-ngl", "--gpu-layers", "--n-gpu-layers"}
    assert options_of(text) == names


def test_devices_are_told_with_their_names() -> None:
    text = (
        "ggml_cuda_init: found 1 CUDA devices:\nAvailable devices:\n"
        "  CUDA0: NVIDIA H200 (143156 MiB, 142500 MiB free)\n"
        "  Vulkan0: AMD Radeon (RADV)\n"
    )
    assert devices_of(text) == (
        ("CUDA0", "NVIDIA H200"),
        ("Vulkan0", "AMD Radeon (RADV)"),
    )
    assert devices_of("Available devices:\n  (none)\n") == ()


def test_a_program_that_is_not_there_is_named_with_where_to_get_it() -> None:
    with pytest.raises(EngineError, match=r"no program 'no-such'; get it from https"):
        Program.find("no-such")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("#!/bin/sh\necho usage: -x\n", "is no llama-server"),
        ("#!/bin/sh\necho bad luck >&2; exit 3\n", "failed with 3: bad luck"),
        ("no program at all", "can't run"),
    ],
)
def test_another_program_is_refused(script: str, says: str, tmp_path: Path) -> None:
    program = tmp_path / "other"
    program.write_text(script)
    program.chmod(0o755)
    with pytest.raises(EngineError, match=says):
        Program.find(str(program))
