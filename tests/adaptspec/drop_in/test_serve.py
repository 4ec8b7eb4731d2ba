"""``transformers serve`` of an exported directory: its texts are the plain model's."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import adaptspec_plugins
import adaptspec_profiles.plugin
from adaptspec.cli import build_cli
from adaptspec.engines.processes import ServerProcess, start_server
from adaptspec.environment import environment_of
from adaptspec.host import Host
from adaptspec.model.loading import load_model
from adaptspec.profile import EVERY_CLASS
from adaptspec.testing.stores import example_profile
from adaptspec_profiles import open_store
from decided import keep

HOST = Host({"bundled": adaptspec_plugins, "profiles": adaptspec_profiles.plugin})
NEEDED = ("pydantic", "fastapi", "uvicorn", "openai", "typer")  # what `serve` imports
ASKED = 24

# In place of the copy's own: it notes in the directory what decoded each request.
# Drafting saves no time on so small a model, so the guard is off, as in other tests.
NOTING = """
import json
from pathlib import Path

from adaptspec.decoder import Decoder
from adaptspec.drop_in.exported import KEPT
from adaptspec.drop_in.exported import generate as decode

*others, guard = Decoder.__init__.__defaults__
Decoder.__init__.__defaults__ = (*others, False)


def generate(**given):
    output = decode(**given)
    model = given["model"]
    (result,) = vars(model)[KEPT].decoder.last
    note = {
        "strategy": result.choice.strategy,
        "ids": result.token_ids,
        "steps": result.stats.target_forwards,
        "streamed": "streamer" in given,
    }
    with Path(model.name_or_path, "notes.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\\n")
    return output
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes, where the model itself drafts, by a decision."""
    place: Path = tmp_path_factory.mktemp("serve")
    target = load_model(model)
    decided = example_profile(
        environment=environment_of(target, target),
        prompt_class=EVERY_CLASS,
        strategy="draft_model",
        params={},
    )
    store = open_store(str(place / "p.db"))
    keep(store, [decided])
    store.close()
    out = place / "fast"
    line = ["export", str(out), "--copy", "-m", str(model), "--draft-model", str(model)]
    line += ["--db", str(place / "p.db")]
    done = CliRunner().invoke(build_cli(HOST), line, obj=HOST)
    assert done.exit_code == 0, done.output
    (out / "custom_generate" / "generate.py").write_text(NOTING)
    return out


@pytest.fixture(scope="module")
def server(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"`transformers serve` needs {', '.join(missing)}")
    program = "from transformers.cli.transformers import main; main()"
    paths = [str(Path(p or ".").resolve()) for p in sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")),
    }

    def command(port: int) -> list[str]:
        asked = [str(folder), "--trust-remote-code", "--device", "cpu"]
        asked += ["--host", "127.0.0.1", "--port", str(port)]
        return [sys.executable, "-c", program, "serve", *asked]

    with start_server("transformers serve", command, environment=environment) as one:
        yield one


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def asked(folder: Path, text: str) -> dict[str, Any]:
    return {
        "model": str(folder),
        "messages": messages(text),
        "max_tokens": ASKED,
        "temperature": 0,
    }


def plainly(model: Path, text: str) -> tuple[list[int], str]:
    """What the model's own ``generate`` answers."""
    loader: Any = AutoModelForCausalLM
    reader: Any = AutoTokenizer
    tokenizer = reader.from_pretrained(model)
    inputs = tokenizer.apply_chat_template(
        messages(text),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    plain = loader.from_pretrained(model).eval()
    output = plain.generate(**inputs, max_new_tokens=ASKED, do_sample=False)
    ids = output[0, inputs["input_ids"].shape[1] :]
    return ids.tolist(), tokenizer.decode(ids, skip_special_tokens=True)


def streamed(server: ServerProcess, asked: dict[str, Any]) -> list[str]:
    """The pieces of text that come one after the other."""
    pieces = []
    path = f"{server.url}/v1/chat/completions"
    given = {**asked, "stream": True}
    with httpx2.stream("POST", path, json=given, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event
                pieces.append(event["choices"][0]["delta"].get("content") or "")
    return [piece for piece in pieces if piece]


def test_streamed_and_whole_answers_are_the_plain_models(
    server: ServerProcess, folder: Path, model: Path
) -> None:
    ids, text = plainly(model, "w9 w8 w7")
    pieces = streamed(server, asked(folder, "w9 w8 w7"))
    assert "".join(pieces) == text
    assert len(pieces) > 1

    more_ids, more_text = plainly(model, "w2 w3 w4 w2 w3")
    # The server generates one answer after the other, so both notes are there then.
    answer = httpx2.post(
        f"{server.url}/v1/chat/completions",
        json=asked(folder, "w2 w3 w4 w2 w3"),
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["choices"][0]["message"]["content"] == more_text
    assert found["usage"]["completion_tokens"] == ASKED

    lines = (folder / "notes.jsonl").read_text().splitlines()
    notes = [json.loads(line) for line in lines]
    assert [note["ids"] for note in notes] == [ids, more_ids]
    assert [note["streamed"] for note in notes] == [True, False]
    for note in notes:
        assert note["strategy"] == "draft_model"
        assert note["steps"] < ASKED / 2  # drafts were accepted
