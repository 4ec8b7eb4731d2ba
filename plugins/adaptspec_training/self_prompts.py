"""Prompts written by the model itself, where a user has none.

An instruction-tuned model that is given its chat template up to where a user speaks
writes what a user might say (Magpie, Xu et al. 2024, arXiv:2406.08464).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.generation_fields import ONE_SEQUENCE
from adaptspec.errors import TrainingError
from adaptspec.model.language_model import LanguageModel
from adaptspec.workloads import Message, Prompt, Workload
from adaptspec_training.answering import Answers
from adaptspec_training.trainer import replace_file

MARK = "\N{REFERENCE MARK}prompt\N{REFERENCE MARK}"
TEMPERATURE = 1.0  # prompts shall differ
LONGEST = 96  # tokens; a prompt that isn't done by then is dropped
SHORTEST = 12  # characters
MOST_ROUNDS = 4  # times the prompts asked for, before giving up


def write_prompts(
    model: LanguageModel,
    count: int,
    path: Path,
    *,
    seed: int,
    batch: int,
    tell: Callable[[str], None],
) -> Workload:
    """``count`` distinct prompts, kept in ``path`` and read from there the next time.

    Raises:
        TrainingError: if the model has no chat template or writes too few.
    """
    if path.exists():
        texts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    else:
        texts = _written(model, count, seed, batch, tell)
        lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        replace_file(path, lines.encode())
    prompts = tuple(
        Prompt(id=f"own-{i}", messages=(Message("user", text),))
        for i, text in enumerate(texts[:count])
    )
    return Workload("own prompts", prompts)


def _written(
    model: LanguageModel, count: int, seed: int, batch: int, tell: Callable[[str], None]
) -> list[str]:
    if not getattr(model.tokenizer, "chat_template", None):
        raise TrainingError(
            f"{model.name} has no chat template, so it can't write users' prompts; "
            "give --data FILE"
        )
    rendered = str(
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False
        )
    )
    start = rendered.partition(MARK)[0]
    ids = list(model.tokenizer(start, add_special_tokens=False)["input_ids"])
    ends = set(Controls.for_model(model, **ONE_SEQUENCE).eos_token_ids)
    answers = Answers(model, TEMPERATURE, seed, tuple(ends), hidden=False)
    found: dict[str, None] = {}
    rounds = -(-count * MOST_ROUNDS // batch)
    for turn in range(rounds):
        tell(f"writing prompts, {len(found)} of {count}")
        names = [f"prompt-{turn}-{i}" for i in range(batch)]
        examples, _ = answers.answer(names, [ids] * batch, [LONGEST] * batch)
        for example in examples:
            answer = example.tokens[len(ids) :]
            text = model.decode(answer).strip()
            if answer[-1] in ends and len(text) >= SHORTEST:
                found.setdefault(text)
        if len(found) >= count:
            return list(found)[:count]
    if len(found) < 2:
        raise TrainingError(
            f"{model.name} wrote {len(found)} usable prompts of {count}; give --data"
        )
    return list(found)
