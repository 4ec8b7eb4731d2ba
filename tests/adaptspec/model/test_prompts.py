"""Whatever people pass as a prompt is read right or refused in one line."""

from __future__ import annotations

import array
import dataclasses
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from pydantic import BaseModel
from transformers import BatchEncoding

from adaptspec.errors import InvalidPromptError
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer

TEMPLATE = """
{%- if tools %}w50 {% endif -%}
{%- for tool in tools or [] %}{{ tool.function.name }} {% endfor -%}
{%- for message in messages -%}
{%- for call in message.tool_calls or [] %}w51 {% endfor -%}
{%- if message['role'] == 'system' and strict is defined -%}
{{ raise_exception('System role not supported') }}
{%- endif -%}
w60 {{ message['role'] + ' ' + message['content'] }} w61{{ ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}w60 assistant{% if enable_thinking %} w40{% endif %}
{%- endif -%}
"""
IDS = [5, 9, 7]
USER = {"role": "user", "content": "w5 w9"}
REPLY = {"role": "assistant", "content": "w7 w8"}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_tokens(["user", "assistant", "system", "tool"])
    tokenizer.pad_token = "w3"
    tokenizer.chat_template = TEMPLATE
    return LanguageModel(tiny_module("llama", vocab_size=68), tokenizer, "tiny")


def ids(model: LanguageModel, text: str) -> list[int]:
    """Of the words of a text, without a template."""
    return [int(model.tokenizer.convert_tokens_to_ids(w)) for w in text.split()]


def refusal(model: LanguageModel, prompt: Any, **given: Any) -> str:
    with pytest.raises(InvalidPromptError) as caught:
        model.encode(prompt, **given)
    message = str(caught.value)
    assert "\n" not in message
    return message


@dataclasses.dataclass
class Said:
    role: str
    content: str


class Answer(BaseModel):
    role: str
    content: str | None = None
    tool_calls: list[str] | None = None


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        [IDS],
        (tuple(IDS),),
        array.array("q", IDS),
        [numpy.int32(i) for i in IDS],
        [torch.tensor(i) for i in IDS],
        *(torch.tensor(IDS, dtype=d) for d in (torch.int64, torch.int32, torch.uint8)),
        torch.tensor([IDS]),
        [torch.tensor(IDS)],
        *(numpy.array(IDS, dtype=kind) for kind in ("int64", "uint16", "int8")),
        numpy.array([IDS]),
        {"input_ids": IDS},
        {"input_ids": [IDS], "attention_mask": [[1, 1, 1]]},
        {"input_ids": torch.tensor([IDS]), "token_type_ids": torch.zeros(1, 3)[:0]},
        {"input_ids": IDS, "token_type_ids": [0, 0, 0], "length": [3]},
        BatchEncoding({"input_ids": IDS, "attention_mask": [1, 1, 1]}),
        BatchEncoding({"input_ids": [IDS], "attention_mask": [[1, 1, 1]]}, None, "pt"),
        BatchEncoding({"input_ids": [IDS], "attention_mask": [[1, 1, 1]]}, None, "np"),
    ],
    ids=lambda prompt: f"{type(prompt).__name__}: {prompt}",
)
def test_ids_are_taken_as_they_are_in_every_form(
    model: LanguageModel, prompt: Any
) -> None:
    if isinstance(prompt, dict) and isinstance(
        prompt.get("token_type_ids"), torch.Tensor
    ):
        prompt = {**prompt, "token_type_ids": torch.zeros(1, 3, dtype=torch.long)}
    assert model.encode(prompt) == IDS


def test_what_the_tokenizer_itself_returns_is_read(model: LanguageModel) -> None:
    for given in ({}, {"return_tensors": "pt"}, {"return_tensors": "np"}):
        assert model.encode(model.tokenizer("w5 w9 w7", **given)) == IDS
    assert model.encode(model.tokenizer.backend_tokenizer.encode("w5 w9 w7")) == IDS


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False])
def test_padding_is_left_out_as_generate_leaves_it_out(
    model: LanguageModel, side: str, masked: bool
) -> None:
    padded = model.tokenizer(
        "w5 w9 w7",
        padding="max_length",
        max_length=6,
        padding_side=side,
        return_tensors="pt",
    )
    assert padded["input_ids"].shape == (1, 6)
    assert model.encode(padded if masked else padded["input_ids"]) == IDS
    if side == "left":
        source: Any = model.source
        theirs = source.generate(
            **(padded if masked else {"input_ids": padded["input_ids"]}),
            pad_token_id=3,
            do_sample=False,
            max_new_tokens=4,
        )
        ours = source.generate(
            torch.tensor([IDS]), do_sample=False, max_new_tokens=4, pad_token_id=3
        )
        assert theirs[0, 6:].tolist() == ours[0, 3:].tolist()


@pytest.mark.parametrize("begins", [True, False])
def test_a_first_token_that_pads_too_is_told_by_the_tokenizer(begins: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token = "w3"
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="w3 $A", special_tokens=[("w3", 3)]
        )
    model = LanguageModel(tiny_module("llama"), tokenizer)
    expected = [3, *IDS] if begins else IDS
    assert model.encode([3, *IDS]) == model.encode([3, 3, 3, *IDS]) == expected
    assert model.encode({"input_ids": [3, *IDS], "attention_mask": [1] * 4})[0] == 3


def test_masks_that_leave_out_the_middle_or_dont_fit_are_refused(
    model: LanguageModel,
) -> None:
    gap = {"input_ids": [[5, 9, 7]], "attention_mask": [[1, 0, 1]]}
    assert "a gap at 1" in refusal(model, gap)
    short = {"input_ids": [[5, 9, 7]], "attention_mask": [[1, 1]]}
    assert "as long as" in refusal(model, short)
    none = {"input_ids": [[5, 9]], "attention_mask": torch.tensor([[False, False]])}
    assert "at least one token" in refusal(model, none)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "got NoneType"),
        (7, "got int"),
        (1.5, "got float"),
        (Path("notes.txt"), r"PosixPath.*read_text"),
        (b"w5 w9", "got bytes; decode it first"),
        pytest.param((i for i in IDS), "got generator; make a list", id="a generator"),
        ({5, 9}, "got set"),
        ([], "at least one token"),
        ("", "the prompt is empty"),
        (" \n\t", "the prompt is empty"),
        ([True, False], "whole numbers, got True"),
        ([5, 1.5], "whole numbers, got 1.5"),
        ([5, None], "whole numbers, got None"),
        ([5, 68], r"0\.\.67, got 68"),
        ([-1], "got -1"),
        (torch.tensor([1.0, 2.0]), "got torch.float32"),
        (torch.tensor([True]), "got torch.bool"),
        (torch.tensor(5), r"\[n\] or \[1, n\], got \[\]"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"got \[1, 2, 3\]"),
        (torch.tensor([IDS, IDS]), "batch of 2 sequences; .*call once per prompt"),
        (numpy.array([1.5]), "got float64"),
        (numpy.array(["w5"]), "whole numbers"),
        (numpy.array(5), r"got \[\]"),
        (numpy.array([IDS, IDS]), "batch of 2"),
        ([IDS, [5]], "batch of 2 sequences"),
        ([torch.tensor(IDS), torch.tensor(IDS)], "batch of 2 sequences"),
        (["w5", "w9"], "batch of 2 texts; .*call once per prompt"),
        ([[USER], [USER]], "batch of 2"),
        ({"input_ids": [IDS, IDS]}, "batch of 2"),
        ({"input_ids": IDS, "pixel_values": 1}, "'pixel_values' can't be read"),
        ({"input_ids": IDS, "token_type_ids": [0, 1, 1]}, "'token_type_ids'"),
        ({"prompt": "w5"}, "a mapping of 'prompt'"),
        (USER, "put the message in a list"),
        ({"messages": [USER]}, "pass its messages alone"),
        ("w5 \ud800 w9", "half a surrogate pair .*character 7|surrogate"),
        ([{"role": "user", "content": "\udcff"}], "half a surrogate pair"),
        ([{"content": "w5"}], "message 1 must be a mapping with a role"),
        ([USER, "w5"], "message 2 must be"),
        ([{"role": "user", "content": None}], r"message 1 \(user\) has no content"),
        ([{"role": "user", "content": 7}], "must be a text .*got int"),
        (
            [
                USER,
                {"role": "user", "content": [{"type": "image_url", "image_url": 1}]},
            ],
            r"message 2 \(user\) has a content part of type 'image_url'",
        ),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_cant_be_read_is_refused_in_one_line(
    model: LanguageModel, prompt: Any, said: str
) -> None:
    import re

    assert re.search(said, refusal(model, prompt))


def test_a_batch_of_one_text_or_chat_is_its_one_prompt(model: LanguageModel) -> None:
    assert model.encode(["w5 w9"]) == model.encode("w5 w9")
    assert model.encode([[USER]]) == model.encode([USER])


def test_a_text_is_a_users_message_unless_it_is_raw(model: LanguageModel) -> None:
    assert model.encode("w5 w9") == model.encode([USER])
    assert model.encode("w5 w9") == ids(model, "w60 user w5 w9 w61 w60 assistant")
    assert model.encode("w5 w9", raw=True) == [5, 9]
    assert model.encode(IDS, raw=True) == IDS
    assert "raw is for a text" in refusal(model, [USER], raw=True)


def test_a_text_is_read_as_it_is_without_a_template() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = None
    model = LanguageModel(tiny_module("llama"), tokenizer, "bare")
    assert model.encode("w5 w9") == [5, 9]
    assert "bare has no chat template" in refusal(model, [USER])
    assert "bare has none" in refusal(model, "w5", tools=[7])


def rendered(model: LanguageModel, chat: Any, **given: Any) -> list[int]:
    """By transformers alone."""
    return list(model.tokenizer.apply_chat_template(chat, **given)["input_ids"])


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w9"}],
        ["w5 ", "w9"],
        [{"type": "input_text", "text": "w5 w9"}],
        [{"text": "w5 w9"}],
    ],
)
def test_content_parts_of_text_are_joined(model: LanguageModel, content: Any) -> None:
    chat = [{"role": "user", "content": content}]
    assert model.encode(chat) == model.encode([USER])


def test_messages_may_be_objects_with_a_role(model: LanguageModel) -> None:
    expected = rendered(model, [USER, REPLY, USER], add_generation_prompt=True)
    kinds: list[Any] = [Said, Answer]
    for kind in kinds:
        chat = [kind(**USER), kind(**REPLY), kind(**USER)]
        assert model.encode(chat) == expected


def test_an_assistants_message_without_content_is_empty(model: LanguageModel) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    chat = [USER, call, {"role": "tool", "content": "w8"}]
    empty = [USER, {**call, "content": ""}, chat[2]]
    assert model.encode(chat) == rendered(model, empty, add_generation_prompt=True)
    bare = [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}, chat[2]]
    assert model.encode(bare) == model.encode(chat)


def test_an_assistants_message_at_the_end_is_continued(model: LanguageModel) -> None:
    chat = [USER, REPLY]
    expected = rendered(model, chat, continue_final_message=True)
    assert (
        model.encode(chat)
        == expected
        == ids(model, "w60 user w5 w9 w61 w60 assistant w7 w8")
    )
    anew = model.encode(chat, template_arguments={"add_generation_prompt": True})
    assert anew == rendered(model, chat, add_generation_prompt=True)
    begun = [USER, {"role": "assistant", "content": ""}]
    assert model.encode(begun) == model.encode([USER])


def test_tools_and_template_arguments_reach_the_template(model: LanguageModel) -> None:
    tool = {"type": "function", "function": {"name": "w33", "parameters": {}}}

    def w34() -> None:
        """Do something."""

    for given in (tool, w34):
        expected = rendered(model, [USER], tools=[given], add_generation_prompt=True)
        assert model.encode([USER], tools=[given]) == expected
        assert model.encode("w5 w9", tools=[given]) == expected
        assert 50 in expected
    thinking = model.encode([USER], template_arguments={"enable_thinking": True})
    assert thinking == [*model.encode([USER]), 40]
    other = {"chat_template": "w9 {{ messages[0].content }}"}
    assert model.encode([USER], template_arguments=other) == [9, 5, 9]


def test_what_a_template_would_drop_is_refused_by_name(model: LanguageModel) -> None:
    wrong = {"enable_thinkin": True}
    said = refusal(model, [USER], template_arguments=wrong)
    assert "tiny doesn't read 'enable_thinkin'" in said
    said = refusal(model, [USER], template_arguments={"documents": []})
    assert "'documents'" in said
    called = {"role": "assistant", "content": "w7", "tool_calls": [{"id": "1"}]}
    plain = {"chat_template": "{{ messages[0].content }}"}
    said = refusal(model, [USER, called, USER], template_arguments=plain)
    assert "doesn't read 'tool_calls'" in said
    assert model.encode([USER], tools=[]) == model.encode([USER])
    said = refusal(model, [USER], template_arguments={"tokenize": True})
    assert "'tokenize' is no argument of a chat template" in said
    assert "tools: token ids are read as they are" in refusal(model, IDS, tools=[7])
    assert "raw leaves it out" in refusal(model, "w5", tools=[7], raw=True)
    assert "refuses the messages: Tools should" in refusal(model, [USER], tools=[7])


def test_what_a_template_raises_is_told_in_one_line(model: LanguageModel) -> None:
    chat = [{"role": "system", "content": "w4"}, USER]
    said = refusal(model, chat, template_arguments={"strict": True})
    assert said == (
        "the chat template of tiny refuses the messages: System role not supported"
    )
    broken = {"chat_template": "{% for %}"}
    assert "refuses the messages" in refusal(model, [USER], template_arguments=broken)


def test_text_without_a_tokenizer_is_refused() -> None:
    model = LanguageModel(tiny_module("llama"))
    for prompt in ("w5", [USER]):
        assert "needs a tokenizer" in refusal(model, prompt)


def test_whatever_a_tokenizer_raises_is_one_line(model: LanguageModel) -> None:
    class Strange:
        pad_token_id = eos_token_id = None

        def __call__(self, text: str, **given: Any) -> Any:
            raise ZeroDivisionError("first\nsecond")

        def decode(self, ids: Any) -> str:
            raise NotImplementedError

    strange = LanguageModel(tiny_module("llama"), Strange(), "odd")
    assert "tokenizer of odd can't read the prompt: first second" in refusal(
        strange, "w5"
    )


def test_a_nul_is_text_like_any_other(model: LanguageModel) -> None:
    assert model.encode("w5 \0 w9", raw=True) == [5, 1, 9]
