"""A server that runs already, measured from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.errors import EngineError, InvalidParamsError
from adaptspec.profile import PLAIN
from adaptspec.workloads import Message, Prompt
from adaptspec_plugins.engines.openai_server import OpenAIServer
from openai_fakes import FakeServer, running

HELLO = Prompt("hello", text="Hello")
CHAT = Prompt(
    "chat",
    messages=(Message("system", "Be brief."), Message("user", "Hi")),
    max_new_tokens=2,
    tools=({"type": "function", "function": {"name": "look"}},),
)


@contextlib.contextmanager
def served(fake: FakeServer, **options: Any) -> Iterator[OpenAIServer]:
    with running(fake):
        engine = OpenAIServer.open(EngineOptions(engine=fake.url, **options))
        with engine:
            yield engine


def owned_by(owner: str, **pages: Any) -> dict[str, Any]:
    models = {"data": [{"id": "the-model", "owned_by": owner}]}
    return {"/v1/models": models, **{f"/{name}": page for name, page in pages.items()}}


def test_prompts_are_chats_and_raw_texts_are_continued() -> None:
    fake = FakeServer()
    with served(fake) as engine:
        raw = replace(HELLO, raw=True)
        answers = engine.answer(PLAIN, {}, [HELLO, CHAT, raw], 3)
    assert [a.text for a in answers] == ["blue is a", "blue is", "blue is a"]
    assert [a.tokens for a in answers] == [3, 2, 3]
    bodies = {
        (path, str(body.get("prompt") or body["messages"][0]["content"])): body
        for path, body in fake.bodies
    }
    chats, completions = "/v1/chat/completions", "/v1/completions"
    assert set(bodies) == {
        (chats, "Hello"),
        (chats, "Be brief."),
        (completions, "Hello"),
    }
    assert {body["temperature"] for body in bodies.values()} == {0}
    assert bodies[chats, "Be brief."]["tools"] == list(CHAT.tools)
    assert bodies[chats, "Be brief."]["messages"][1] == {
        "role": "user",
        "content": "Hi",
    }


@pytest.mark.slow
def test_without_a_chat_template_a_text_is_read_as_it_is_and_a_chat_refused() -> None:
    fake = FakeServer(template=False)
    with served(fake) as engine:
        for _ in range(2):
            (answer,) = engine.answer(PLAIN, {}, [HELLO], 3)
            assert answer.text == "blue is a"
        with pytest.raises(EngineError, match="no Chat Template"):
            engine.answer(PLAIN, {}, [CHAT], 3)
    assert [path.removeprefix("/v1/") for path, _ in fake.bodies] == [
        *("chat/completions", "completions"),  # the second time it is known
        *("completions", "chat/completions"),
    ]


def test_the_environment_tells_servers_and_models_apart() -> None:
    models = {"data": [{"id": "one"}, {"id": "two"}]}
    fake = FakeServer(pages={"/v1/models": models})
    places = []
    with running(fake), running(FakeServer(pages={"/v1/models": models})) as other:
        for url, model in ((fake.url, "one"), (fake.url, "two"), (other.url, "one")):
            options = EngineOptions(engine=url, model=model, concurrency=4)
            with OpenAIServer.open(options) as engine:
                places.append(engine.environment)
    assert len({place.model for place in places}) == 3
    assert {(p.engine, p.device, p.concurrency) for p in places} == {
        ("openai", "server", 4)
    }
    assert places[1].model_name == "two"
    assert places[0].device_name == f"{fake.url}/v1"
    assert places[0].versions["server"] == "Fake/1.2"


def test_an_address_with_and_without_its_path_is_one_place() -> None:
    with running(FakeServer()) as fake:
        with OpenAIServer.open(EngineOptions(engine=fake.url)) as one:
            with OpenAIServer.open(EngineOptions(engine=f"{fake.url}/v1/")) as other:
                assert one.environment == other.environment


@pytest.mark.parametrize(
    ("pages", "kind", "version"),
    [
        (owned_by("vllm", version={"version": "0.32.0"}), "vllm", "0.32.0"),
        (owned_by("llamacpp", props={"build_info": "b9-a"}), "llama.cpp", "b9-a"),
        (owned_by("sglang", server_info={"version": "0.9"}), "sglang", "0.9"),
        (owned_by("vllm"), "vllm", "unknown"),
    ],
)
def test_known_servers_tell_their_version(
    pages: dict[str, Any], kind: str, version: str
) -> None:
    with served(FakeServer(pages=pages)) as engine:
        assert engine.environment.versions[kind] == version


@pytest.mark.parametrize(
    ("owner", "field"), [("vllm", "cache_salt"), ("llamacpp", "cache_prompt")]
)
def test_caches_of_prompts_are_kept_out_where_the_server_can(
    owner: str, field: str
) -> None:
    fake = FakeServer(pages=owned_by(owner))
    with served(fake) as engine:
        engine.answer(PLAIN, {}, [HELLO], 3)
        engine.answer(PLAIN, {}, [CHAT], 3)
        assert engine.notes == []
    told = [body[field] for _, body in fake.bodies]
    assert told == [False, False] or len(set(told)) == 2


@pytest.mark.slow
def test_notes_say_what_was_cached_and_counted() -> None:
    with served(FakeServer(cached=6)) as engine:
        assert engine.notes == []
        engine.answer(PLAIN, {}, [HELLO, HELLO], 3)
        assert "12 of 14 prompt tokens" in engine.notes[0]
    with served(FakeServer(cached=0)) as engine:
        engine.answer(PLAIN, {}, [HELLO], 3)
        assert engine.notes == []
    with served(FakeServer()) as engine:
        engine.answer(PLAIN, {}, [HELLO], 3)
        assert "doesn't say whether" in engine.notes[0]
    with served(FakeServer(usage=False)) as engine:
        engine.answer(PLAIN, {}, [HELLO], 3)
        assert "doesn't count tokens" in engine.notes[-1]


def test_a_note_says_that_the_server_cut_answers() -> None:
    with served(FakeServer(most=2, cached=0)) as engine:
        engine.answer(PLAIN, {}, [CHAT], 3)  # it asks for 2
        assert engine.notes == []
        engine.answer(PLAIN, {}, [HELLO], 3)
        (note,) = engine.notes
        assert "as were asked for: 1." in note
    with served(FakeServer(most=2, usage=False, steps=2)) as engine:
        engine.answer(PLAIN, {}, [HELLO], 3)  # a chunk may hold several tokens
        assert "asked for" not in " ".join(engine.notes)


def test_a_busy_server_is_asked_again() -> None:
    with served(FakeServer(busy=[(429, "0"), (503, "0")])) as engine:
        assert engine.answer(PLAIN, {}, [HELLO], 3)[0].tokens == 3


def slot(types: str, speculative: bool = True) -> dict[str, Any]:
    return {"speculative": speculative, "params": {"speculative.types": types}}


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        (owned_by("vllm"), "doesn't say whether it drafts from earlier answers"),
        (owned_by("llamacpp"), "doesn't say whether it drafts"),
        (
            owned_by("llamacpp", slots=[{"speculative": True}, slot("x,ngram-mod")]),
            "drafts by ngram-mod from earlier requests",
        ),
        (owned_by("llamacpp", slots=[slot("ngram-simple")]), None),
        (owned_by("llamacpp", slots=[slot("ngram-mod", False)]), None),
    ],
)
def test_a_note_says_what_an_earlier_answer_may_give(
    pages: dict[str, Any], words: str | None
) -> None:
    with served(FakeServer(pages=pages, cached=0)) as engine:
        engine.answer(PLAIN, {}, [HELLO], 2)
        assert engine.notes == []
        engine.answer(PLAIN, {}, [replace(HELLO, id="other")], 3)
        notes = " ".join(engine.notes)
    assert words in notes if words else not notes


def test_a_server_without_a_list_of_models_is_asked_by_a_name() -> None:
    fake = FakeServer(pages={"/v1/models": (404, {"detail": "no"})})
    with served(fake, model="mine") as engine:
        (answer,) = engine.answer(PLAIN, {}, [HELLO], 3)
        assert engine.environment.versions["server"] == "unknown"
    assert answer.tokens == 3
    assert fake.bodies[-1][1]["model"] == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "other"}, "no model 'other'; it serves: the-model"),
        ({"draft_model": "d"}, "leave out --draft-model"),
        ({"heads": ("h",), "threads": 2}, "leave out --heads, --threads"),
        ({"arguments": ("--x",)}, "leave out arguments"),
        ({"concurrency": 0}, "concurrency must be 1 or more"),
    ],
)
def test_what_a_deployed_server_cannot_be_told_is_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(EngineError, match=words), served(FakeServer(), **options):
        pass


def test_a_name_is_needed_where_there_are_several_models_or_no_list() -> None:
    several = FakeServer(pages={"/v1/models": {"data": [{"id": "a"}, {"id": "b"}]}})
    with pytest.raises(EngineError, match="serves a, b; name one with --model"):
        with served(several):
            pass
    silent = FakeServer(pages={"/v1/models": (404, {"detail": "no"})})
    with pytest.raises(EngineError, match="404"), served(silent):
        pass
    odd = FakeServer(pages={"/v1/models": {"models": []}})
    with pytest.raises(EngineError, match="lists its models there under `data`"):
        with served(odd):
            pass


def test_a_key_is_taken_from_the_options_before_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-variable")
    with served(FakeServer(key="of-the-variable")) as engine:
        assert engine.environment.model_name == "the-model"
    with served(FakeServer(key="told"), api_key="told"):
        pass
    with pytest.raises(EngineError, match="OPENAI_API_KEY"):
        with served(FakeServer(key="told")):
            pass


def test_there_is_one_method_and_nothing_to_start() -> None:
    with served(FakeServer()) as engine:
        assert [m.name for m in engine.methods] == [PLAIN]
        assert "as deployed" in engine.methods[0].summary
        with pytest.raises(EngineError, match="no method 'ngram'"):
            engine.answer("ngram", {}, [HELLO], 3)
        with pytest.raises(InvalidParamsError):
            engine.answer(PLAIN, {"k": 3}, [HELLO], 3)
        with pytest.raises(EngineError, match="isn't started with flags"):
            engine.launch(PLAIN, {})


def test_a_name_is_no_address() -> None:
    with pytest.raises(EngineError, match=r"given as its address.*got 'openai'"):
        OpenAIServer.open(EngineOptions(engine="openai"))
