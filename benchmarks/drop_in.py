"""Compare the drop-in with transformers' own ``generate``, family by family.

    python benchmarks/drop_in.py [FAMILY...]

Each family of :mod:`tiny_families` decodes, with drafts where it can verify any: three
single prompts; a batch of them, padded on the left, whose rows end early; a sample.
A line says for each which outputs are those of ``generate``. Of the batch, ``alone``
means that rows are what ``generate`` gives them without the others.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import transformers

import adaptspec
import tiny_families
from adaptspec.drop_in.speed_up import SpeedUp
from adaptspec.errors import AdaptSpecError
from adaptspec_profiles.memory import MemoryStore

PROMPTS = [list(prompt) for prompt in tiny_families.PROMPTS[1:4]]
WIDTH = max(map(len, PROMPTS))
NEW = 24


def asked(prompts: list[list[int]], **more: Any) -> dict[str, Any]:
    """Arguments of ``generate`` for a batch."""
    width = max(map(len, prompts))
    return {
        "inputs": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        ),
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        **more,
    }


def outcome(call: Any, arguments: dict[str, Any]) -> list[list[int]] | str:
    """New tokens of each row, or why there are none."""
    torch.manual_seed(1)
    try:
        output = call(**arguments)
    except AdaptSpecError as error:
        return f"refused: {error}"
    except Exception as error:  # whatever a family's own code raises
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    rows: list[list[int]] = output[:, arguments["inputs"].shape[1] :].tolist()
    return rows


def compared(expected: list[list[int]] | str, found: list[list[int]] | str) -> str:
    """``equal``, ``different``, or what went wrong."""
    if isinstance(expected, str):
        return f"generate fails ({expected[:60]})"
    if isinstance(found, str):
        return found[:100]
    return "equal" if expected == found else "different"


def check(family: str) -> str:
    """One line about a family."""
    try:
        module = tiny_families.tiny_module(family)
    except Exception as error:
        return f"not built: {error}".partition("\n")[0]
    singles = [asked([prompt]) for prompt in PROMPTS]
    sampled = asked(PROMPTS[2:], do_sample=True, temperature=1.2, top_k=20)
    plain = [outcome(module.generate, one) for one in (*singles, sampled)]
    # Tokens that come early in the first prompts end all rows.
    ends = [
        rows[0][place]
        for rows, place in zip(plain, (10, 15), strict=False)
        if not isinstance(rows, str)
    ]
    batch = asked(PROMPTS, eos_token_id=ends or None)
    plain.append(outcome(module.generate, batch))
    alone = [
        outcome(module.generate, one | {"eos_token_id": ends or None})
        for one in singles
    ]
    try:
        decoder = adaptspec.load(module, db=MemoryStore())
        level = decoder.model.capability.level
    except Exception as error:
        return f"not loaded: {error}".partition("\n")[0]
    decoder.engine.guard = False
    strategy = "autoregressive" if level == "plain" else "prompt_lookup"
    accepted = 0
    found = []
    fast = SpeedUp(module, decoder, strategy=strategy)
    for one in (*singles, sampled, batch):
        found.append(outcome(fast, one))
        steps = [step for row in decoder.last for step in row.stats.steps]
        accepted += sum(step.accepted for step in steps)
    said = [compared(*pair) for pair in zip(plain, found, strict=True)]
    if said[-1] == "different" and not isinstance(found[-1], str):
        rows = zip(alone, found[-1], strict=True)
        same = [not isinstance(a, str) and row[: len(a[0])] == a[0] for a, row in rows]
        said[-1] = "alone" if all(same) else "different"
    single = said[0] if len(set(said[:3])) == 1 else "; ".join(said[:3])
    return (
        f"{level}, {accepted} accepted | prompts {single} | sample {said[3]} "
        f"| batch {said[4]}"
    )


def main() -> None:
    """Check the families named, or all."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    for family in sys.argv[1:] or tiny_families.case_names():
        print(f"{family}: {check(family)}", flush=True)


if __name__ == "__main__":
    main()
