"""What people pass as a prompt, turned into the token ids that the model reads."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

import torch

from adaptspec.errors import InvalidPromptError
from adaptspec.model.messages import message_fields

if TYPE_CHECKING:
    from adaptspec.model.forward import TextModel


class Array(Protocol):
    """An array of numpy or of a library that numpy can read."""

    def __array__(self) -> Any:
        """As numpy's."""


# A text; chat messages or ids; what a tokenizer returns; ids as an array.
Prompt = str | Sequence[Any] | Mapping[str, Any] | torch.Tensor | Array

ACCEPTED = (
    "a prompt must be a text, chat messages, or token ids (a list, an array, a tensor, "
    "or a tokenizer's output)"
)
ONE = "pass one prompt at a time: call once per prompt"
# Keys of a tokenizer's output that change nothing for a causal language model.
IGNORED_KEYS = frozenset(
    {"attention_mask", "length", "offset_mapping", "special_tokens_mask"}
)
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
# Arguments of `apply_chat_template` that are no business of the template.
NOT_FOR_TEMPLATES = frozenset(
    {
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
# Those that every template has, whether or not its text names them.
OF_ALL_TEMPLATES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "sanitize_control_tokens",
    }
)


def encode_prompt(
    model: TextModel,
    prompt: Any,
    *,
    raw: bool = False,
    tools: Sequence[Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids of a prompt; every caller's prompts go through here.

    * A text is a user's message where the model has a chat template, and is read as it
      is where it has none or ``raw`` is given.
    * Chat messages are rendered with the model's template. An assistant's message at
      the end is continued; otherwise the model answers.
    * Ids are taken as they are, without padding: what an attention mask leaves out,
      and, where there is no mask, padding tokens at both ends.

    Args:
        raw: Read a text as it is, without the chat template.
        tools: What the model may call: JSON schemas, or functions with type hints.
        template_arguments: Further arguments of the model's chat template, such as
            ``enable_thinking`` or ``documents``.

    Raises:
        InvalidPromptError: if it is none of these, is empty, is several prompts, has
            ids outside the vocabulary, or needs a tokenizer or chat template that
            isn't there.
    """
    prompt = _only_one(prompt)
    if not isinstance(template_arguments, Mapping | None):
        raise InvalidPromptError(
            "template_arguments must be a mapping of names to values, got "
            f"{template_arguments!r}; pass {{'enable_thinking': False}}, say"
        )
    if not isinstance(tools, list | tuple | None):
        raise InvalidPromptError(
            f"tools must be a list of JSON schemas or functions, got {tools!r}; put a "
            "single one in a list"
        )
    arguments = dict(template_arguments or {})
    if tools:
        arguments["tools"] = list(tools)
    ids = _given_ids(model, prompt)
    if ids is None:
        ids = _read(model, prompt, raw, arguments)
    elif arguments:
        raise InvalidPromptError(
            f"{', '.join(sorted(arguments))}: token ids are read as they are, without "
            "the chat template; pass chat messages or a text instead"
        )
    if not ids:
        raise InvalidPromptError("a prompt must have at least one token, got none")
    known = min(model.vocab_size, model.input_size)
    if bad := [i for i in ids if not 0 <= i < known]:
        raise InvalidPromptError(f"token ids must be in 0..{known - 1}, got {bad[0]}")
    return ids


def _only_one(prompt: Any) -> Any:
    """A batch of one is its one prompt.

    Raises:
        InvalidPromptError: if there are several.
    """
    if isinstance(prompt, list | tuple) and prompt:
        first = prompt[0]
        if isinstance(first, str) or _is_row(first):
            if len(prompt) > 1:
                kind = "texts" if isinstance(first, str) else "sequences"
                raise InvalidPromptError(f"got a batch of {len(prompt)} {kind}; {ONE}")
            return _only_one(first)
    return prompt


def _is_row(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return True
    return getattr(value, "ndim", 0) > 0


def _given_ids(model: TextModel, prompt: Any) -> list[int] | None:
    """The ids that ``prompt`` holds; None if it is text or messages."""
    mask: list[int] | None = None
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise InvalidPromptError(
                f"{ACCEPTED}, got a mapping of {_names(prompt)}"
                + ("; put the message in a list" if "role" in prompt else "")
                + ("; pass its messages alone" if "messages" in prompt else "")
            )
        mask = _mask(prompt)
        prompt = prompt["input_ids"]
    elif hasattr(prompt, "ids") and hasattr(prompt, "attention_mask"):
        mask, prompt = list(prompt.attention_mask), list(prompt.ids)  # of `tokenizers`
    ids = _numbers(prompt)
    if ids is None:
        return None
    if mask is None:
        return _without_pads(model, ids)
    if len(mask) != len(ids):
        raise InvalidPromptError(
            f"attention_mask must be as long as input_ids, got {len(mask)} and "
            f"{len(ids)}"
        )
    return _attended(ids, mask)


def _names(mapping: Any) -> str:
    names = [ascii(key) for key in list(mapping.keys())[:5]]
    return ", ".join(names) or "nothing"


def _mask(encoded: Any) -> list[int] | None:
    for key in encoded.keys():
        if key == "input_ids" or key in IGNORED_KEYS:
            continue
        # Segment ids tell nothing where all are of the first segment.
        if key == "token_type_ids" and not any(_numbers(encoded[key]) or ()):
            continue
        if encoded[key] is not None:
            raise InvalidPromptError(
                f"{key!r} can't be read along with input_ids, only attention_mask; "
                "leave it out"
            )
    mask = encoded["attention_mask"] if "attention_mask" in encoded else None
    if isinstance(mask, torch.Tensor):
        mask = mask.long()  # masks may be truth values
    return None if mask is None else [int(m) for m in _numbers(mask, bools=True) or ()]


def _numbers(value: Any, bools: bool = False) -> list[int] | None:
    """Integers of ``[n]`` or ``[1, n]``; None if these aren't meant to be numbers."""
    if isinstance(value, str | bytes | bytearray | memoryview | PurePath):
        return None
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise _not_whole(value.dtype)
        _check_shape(value.shape)
        return [int(token) for token in value.reshape(-1).tolist()]
    if hasattr(value, "__array__") and hasattr(value, "dtype"):
        import numpy

        array = numpy.asarray(value)
        if array.dtype.kind not in ("iub" if bools else "iu"):
            raise _not_whole(array.dtype)
        _check_shape(array.shape)
        return [int(token) for token in array.reshape(-1).tolist()]
    if not isinstance(value, Sequence):
        return None
    value = _only_one(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None if isinstance(value, str) else _numbers(value, bools)
    if any(isinstance(item, str) or message_fields(item) for item in value):
        return None
    return [_whole(item, bools) for item in value]


def _whole(item: Any, bools: bool) -> int:
    dtype = getattr(item, "dtype", None)
    if (isinstance(item, bool) or dtype == torch.bool) and not bools:
        raise InvalidPromptError(f"token ids must be whole numbers, got {item}")
    try:
        return operator.index(item)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidPromptError(
            f"token ids must be whole numbers, got {ascii(item)[:60]}"
        ) from None


def _not_whole(dtype: Any) -> InvalidPromptError:
    return InvalidPromptError(f"token ids must be whole numbers, got {dtype}")


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) == 2 and shape[0] > 1:
        raise InvalidPromptError(f"got a batch of {shape[0]} sequences; {ONE}")
    if len(shape) != 1 and not (len(shape) == 2 and shape[0] == 1):
        raise InvalidPromptError(
            f"input ids must be [n] or [1, n], got {list(map(int, shape))}"
        )


def _attended(ids: list[int], mask: list[int]) -> list[int]:
    """The ids that the mask lets the model see, all of one piece."""
    seen = [place for place, value in enumerate(mask) if value]
    if not seen:
        return []
    first, last = seen[0], seen[-1]
    if len(seen) != last + 1 - first:
        raise InvalidPromptError(
            "attention_mask may leave out padding at the ends only, got a gap at "
            f"{next(i for i in range(first, last) if not mask[i])}; pass the ids that "
            "are to be read"
        )
    return ids[first : last + 1]


def _without_pads(model: TextModel, ids: list[int]) -> list[int]:
    """Without padding at both ends, which the model's own ``generate`` masks, too.

    Where a text may end with the padding token, nothing tells them apart. Where the
    tokenizer begins texts with it, one stays in front.
    """
    pads = _special(model, "pad_token_id")
    if len(pads) != 1 or pads & _special(model, "eos_token_id"):
        return ids
    first, last = 0, len(ids)
    while first < last and ids[first] in pads:
        first += 1
    while last > first and ids[last - 1] in pads:
        last -= 1
    if first and pads & _special(model, "bos_token_id") and _begins(model, ids[0]):
        first -= 1
    return ids[first:last]


def _begins(model: TextModel, token: int) -> bool:
    """Whether texts begin with ``token``; without a tokenizer they may."""
    if model.tokenizer is None:
        return True
    return _tokenized(model, "", add_special_tokens=True)[:1] == [token]


def _special(model: TextModel, name: str) -> set[int]:
    for source in (model.generation_config, model.config, model.tokenizer):
        value = getattr(source, name, None)
        if value is not None:
            return set(value) if isinstance(value, list | tuple) else {value}
    return set()


def _read(
    model: TextModel, prompt: Any, raw: bool, arguments: Mapping[str, Any]
) -> list[int]:
    """The ids of a text or of chat messages."""
    is_text = isinstance(prompt, str)
    messages = [] if is_text else _messages(prompt)
    if model.tokenizer is None:
        raise InvalidPromptError(
            "a text prompt needs a tokenizer; pass token ids or load the model "
            "with its tokenizer"
        )
    has_template = bool(getattr(model.tokenizer, "chat_template", None))
    if is_text and (raw or not has_template):
        if arguments:
            why = "raw leaves it out" if raw else f"{model.name} has none"
            raise InvalidPromptError(
                f"{', '.join(sorted(arguments))}: meant for the chat template, but "
                f"{why}; leave the arguments out"
            )
        return _tokenized(model, prompt, add_special_tokens=True)
    if raw:
        raise InvalidPromptError("raw is for a text; chat messages need the template")
    if not has_template:
        raise InvalidPromptError(
            f"{model.name} has no chat template; pass a text prompt instead"
        )
    if is_text:
        if not prompt.strip():
            raise InvalidPromptError("the prompt is empty; say something, or pass raw")
        messages = [{"role": "user", "content": prompt}]
    text = _rendered(model, messages, arguments)
    return _tokenized(model, text, add_special_tokens=False)


def _tokenized(model: TextModel, text: str, add_special_tokens: bool) -> list[int]:
    at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if at is not None:
        raise InvalidPromptError(
            f"a text must be valid Unicode, got half a surrogate pair ({text[at]!a} at "
            f"character {at}); repair it with "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        )
    try:
        found = model.tokenizer(text, add_special_tokens=add_special_tokens)
        return [int(token) for token in found["input_ids"]]
    # A tokenizer may be anybody's code and raise anything.
    except Exception as error:
        raise InvalidPromptError(
            f"the tokenizer of {model.name} can't read the prompt: {_line(error)}; "
            "pass token ids"
        ) from error


def _messages(prompt: Any) -> list[dict[str, Any]]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        hint = ""
        if isinstance(prompt, PurePath):
            hint = "; pass the file's text: path.read_text()"
        elif isinstance(prompt, bytes | bytearray):
            hint = "; decode it first"
        elif hasattr(prompt, "__next__"):
            hint = "; make a list of it"
        raise InvalidPromptError(f"{ACCEPTED}, got {type(prompt).__name__}{hint}")
    return [_message(number, message) for number, message in enumerate(prompt, 1)]


def _message(number: int, given: Any) -> dict[str, Any]:
    """A message with its text in one piece, and without keys that hold nothing."""
    where = f"message {number}"
    message = {k: v for k, v in message_fields(given).items() if v is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidPromptError(
            f"{where} must be a mapping with a role and content, got "
            f"{ascii(given)[:60]}"
        )
    content = message.get("content")
    if content is None:
        if role != "assistant":
            raise InvalidPromptError(
                f"{where} ({role}) has no content; only an assistant's message may "
                "have none"
            )
    elif isinstance(content, list | tuple):
        parts = [_part(f"{where} ({role})", part) for part in content]
        message["content"] = "".join(parts)
    elif not isinstance(content, str):
        raise InvalidPromptError(
            f"the content of {where} ({role}) must be a text or a list of text parts, "
            f"got {type(content).__name__}"
        )
    return message


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    fields = message_fields(part)
    kind, text = fields.get("type", "text"), fields.get("text")
    if kind in TEXT_PARTS and isinstance(text, str):
        return text
    raise InvalidPromptError(
        f"{where} has a content part of type {ascii(kind)[:40]}, and only text can be "
        "read; leave it out"
    )


def _rendered(
    model: TextModel,
    messages: list[dict[str, Any]],
    arguments: Mapping[str, Any],
) -> str:
    arguments = dict(arguments)
    _check_read(model, arguments, messages)
    if not arguments.keys() & {"add_generation_prompt", "continue_final_message"}:
        last = messages[-1] if messages else {}
        continued = last.get("role") == "assistant" and not last.get("tool_calls")
        if continued and not last.get("content"):
            messages, continued = messages[:-1], False  # nothing to go on from
        arguments["continue_final_message"] = continued
        arguments["add_generation_prompt"] = not continued
    try:
        return _applied(model, messages, arguments)
    # A template is a program of the model's makers and may raise anything.
    except Exception as error:
        if all("content" in message for message in messages):
            raise _refused(model, error) from error
    # Some templates put texts together without looking whether there is one.
    filled = [{"content": "", **message} for message in messages]
    try:
        return _applied(model, filled, arguments)
    except Exception as error:
        raise _refused(model, error) from error


def _applied(
    model: TextModel,
    messages: list[dict[str, Any]],
    arguments: Mapping[str, Any],
) -> str:
    return str(
        model.tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    )


def _refused(model: TextModel, error: Exception) -> InvalidPromptError:
    return InvalidPromptError(
        f"the chat template of {model.name} refuses the messages: {_line(error)}"
    )


def _check_read(
    model: TextModel,
    arguments: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
) -> None:
    """Refuse what the template would drop without a word."""
    template = arguments.get("chat_template") or model.tokenizer.chat_template
    text = " ".join(template.values()) if isinstance(template, dict) else str(template)
    given = [name for name in arguments if name not in OF_ALL_TEMPLATES]
    if any(message.get("tool_calls") for message in messages):
        given.append("tool_calls")
    for name in given:
        if name in NOT_FOR_TEMPLATES:
            raise InvalidPromptError(
                f"{name!r} is no argument of a chat template; leave it out"
            )
        if not re.search(rf"\b{name}\b", text):
            raise InvalidPromptError(
                f"the chat template of {model.name} doesn't read {name!r}; leave it out"
            )


def _line(error: Exception) -> str:
    """What an error says, on one line."""
    said = " ".join(str(error).split())
    return (said or type(error).__name__)[:200]
