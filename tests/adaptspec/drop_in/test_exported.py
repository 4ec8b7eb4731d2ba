"""Models loaded from exported directories: as the model's own ``generate``, faster."""

from __future__ import annotations

import copy
import importlib
import shutil
import string
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

import adaptspec_plugins
import adaptspec_profiles.plugin
from adaptspec.decoder import load
from adaptspec.drop_in import exported
from adaptspec.drop_in.directory import SETTINGS, DirectoryError, export_directory
from adaptspec.environment import environment_of
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.loading import load_model
from adaptspec.profile import EVERY_CLASS, PLAIN
from adaptspec.testing.stores import example_profile
from adaptspec_profiles import open_store
from decided import keep

HOST = Host({"bundled": adaptspec_plugins, "profiles": adaptspec_profiles.plugin})
PROMPT = torch.tensor([[2, 3, 4, 5, 2, 3, 4, 5, 2, 3]])


def read(folder: Path, **given: Any) -> Any:
    reader: Any = AutoModelForCausalLM
    return reader.from_pretrained(folder, **given).eval()


@pytest.fixture(autouse=True)
def modules(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies generate.py to a place of ours."""
    place = str(tmp_path_factory.mktemp("modules"))
    for name in "transformers.dynamic_module_utils", "transformers.utils.hub":
        monkeypatch.setattr(f"{name}.HF_MODULES_CACHE", place)


@pytest.fixture(scope="module")
def db(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where drafting with a draft model was decided on."""
    path = str(tmp_path_factory.mktemp("store") / "p.db")
    target = load_model(model)
    place = environment_of(target, target)
    profiles = []
    for strategy, ratio in (PLAIN, 1.0), ("draft_model", 2.0):
        measured = replace(
            example_profile().measurement,
            ratio=ratio,
            interval_low=0.9 * ratio,
            interval_high=1.1 * ratio,
        )
        profiles.append(
            example_profile(
                environment=place,
                prompt_class=EVERY_CLASS,
                strategy=strategy,
                params={},
                measurement=measured,
            )
        )
    store = open_store(path)
    keep(store, profiles)
    store.close()
    return path


@pytest.fixture(scope="module")
def folder(model: Path, db: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copied directory, moved after it was written, with the model as its draft."""
    place: Path = tmp_path_factory.mktemp("moved")
    written = place / "written"
    export_directory(written, str(model), str(model), (), db, host=HOST, copy=True)
    return written.rename(place / "elsewhere")


@pytest.fixture
def fast(folder: Path) -> Iterator[Any]:
    found = read(folder, trust_remote_code=True)
    yield found
    if (kept := vars(found).get(exported.KEPT)) is not None:
        kept.decoder.save()


def of_letters() -> Any:
    """A tokenizer whose tokens are characters, as stop strings need it."""
    characters = string.ascii_letters + string.digits + "_-"
    tokens = {character: number for number, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(tokenizer_object=tokenizer)


def choice(model: Any) -> Any:
    return vars(model)[exported.KEPT].decoder.last[0].choice


@pytest.mark.parametrize("controls", [{}, {"repetition_penalty": 1.3}])
def test_output_is_the_models_own_and_the_draft_model_is_used(
    fast: Any, model: Path, controls: dict[str, Any]
) -> None:
    given = {"max_new_tokens": 24, "do_sample": False, **controls}
    expected = read(model).generate(PROMPT, **given)
    assert torch.equal(fast.generate(PROMPT, **given), expected)
    assert choice(fast).strategy == "draft_model"
    (result,) = vars(fast)[exported.KEPT].decoder.last
    assert result.stats.tokens_per_forward > 2


def test_without_trust_the_directory_is_a_plain_model(folder: Path) -> None:
    assert "generate" not in vars(read(folder))


def test_stop_strings_and_streamers_reach_it(fast: Any, model: Path) -> None:
    tokenizer = of_letters()
    plain = read(model)
    whole = plain.generate(PROMPT, max_new_tokens=24, do_sample=False)
    stop = tokenizer.decode(whole[0, -8:-6])
    given = {
        "max_new_tokens": 24,
        "do_sample": False,
        "stop_strings": [stop],
        "tokenizer": tokenizer,
    }
    expected = plain.generate(PROMPT, **given)
    assert expected.shape < whole.shape
    pieces = {}
    for name, one in ("plain", plain), ("fast", fast):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        found: list[Any] = []

        def run(one: Any = one, streamer: Any = streamer, found: Any = found) -> None:
            found.append(one.generate(PROMPT, streamer=streamer, **given))

        thread = threading.Thread(target=run)
        thread.start()
        pieces[name] = "".join(streamer)
        thread.join()
        assert torch.equal(found[0], expected)
    assert pieces["fast"] == pieces["plain"]


def test_a_pipeline_decodes_through_it(folder: Path, model: Path) -> None:
    given = {"max_new_tokens": 12, "do_sample": False}
    texts = []
    for place in folder, model:
        pipe: Any = pipeline(
            "text-generation", str(place), trust_remote_code=place is folder
        )
        texts.append(pipe("w2 w3 w2 w3", **given))
        assert (exported.KEPT in vars(pipe.model)) == (place is folder)
    assert texts[0] == texts[1]


def test_generate_takes_the_directory_by_name(folder: Path) -> None:
    plain = read(folder)
    given = {"max_new_tokens": 12, "do_sample": False}
    expected = plain.generate(PROMPT, **given)
    found = plain.generate(
        PROMPT, custom_generate=str(folder), trust_remote_code=True, **given
    )
    assert torch.equal(found, expected)
    assert choice(plain).strategy == "draft_model"


def test_a_model_from_elsewhere_is_refused(folder: Path, model: Path) -> None:
    with pytest.raises(DirectoryError, match="write the directory anew"):
        read(model).generate(
            PROMPT, custom_generate=str(folder), trust_remote_code=True
        )


def test_what_cannot_be_honoured_is_named(fast: Any) -> None:
    with pytest.raises(AdaptSpecError, match="num_beams"):
        fast.generate(PROMPT, num_beams=2, max_new_tokens=4)


def test_everything_is_loaded_once(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given)
        return load(*given, **more)

    monkeypatch.setattr("adaptspec.drop_in.exported.load", counted)

    def ask() -> None:
        fast.generate(PROMPT, max_new_tokens=2, do_sample=False)

    held = fast.generate
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held(PROMPT, max_new_tokens=2, do_sample=False)
    assert len(calls) == 1


@pytest.mark.slow
def test_a_copied_model_has_a_decoder_of_its_own(fast: Any) -> None:
    given = {"max_new_tokens": 12, "do_sample": False}
    expected = fast.generate(PROMPT, **given)
    other = copy.deepcopy(fast)
    assert torch.equal(other.generate(PROMPT, **given), expected)
    kept = vars(other)[exported.KEPT]
    assert kept.model is other
    assert kept is not vars(fast)[exported.KEPT]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::adaptspec.decoder.PlainDecodingWarning")
def test_the_draft_model_follows_another_type(folder: Path) -> None:
    half = read(folder, trust_remote_code=True, dtype=torch.bfloat16)
    half.generate(PROMPT, max_new_tokens=2, do_sample=False)
    draft = vars(half)[exported.KEPT].decoder.draft
    assert draft.dtype == torch.bfloat16


def test_a_relative_path_that_is_left_says_what_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    loaded = read(Path(folder.name), trust_remote_code=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DirectoryError, match="load it by its whole path"):
        loaded.generate(PROMPT, max_new_tokens=2)


def test_a_draft_model_that_is_gone_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "adaptspec" / "draft")
    loaded = read(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(AdaptSpecError, match="there is no folder") as caught:
        loaded.generate(PROMPT, max_new_tokens=2)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / SETTINGS).exists()


def test_without_adaptspec_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers looks for what the file imports before it runs it."""
    real: Callable[..., Any] = importlib.import_module

    def missing(name: str, *given: Any) -> Any:
        if name == "adaptspec":
            raise ImportError("No module named 'adaptspec'")
        return real(name, *given)

    monkeypatch.setattr(
        "transformers.dynamic_module_utils.importlib.import_module", missing
    )
    with pytest.raises(ImportError, match="pip install adaptspec"):
        read(folder, trust_remote_code=True)
