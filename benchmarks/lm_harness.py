"""lm-evaluation-harness through the drop-in: equal outputs, and what each takes.

Two generation tasks are made of Spec-Bench's prompts and read by the harness's own task
machinery, from a YAML file and JSON lines each. Its ``hf`` model runs them with a model
as it is and with one that :func:`adaptspec.speed_up` bound, in turns of a few samples,
so that what the machine does besides meets both.

    pip install lm-eval
    adaptspec tune --workload spec-bench.jsonl --dtype float32 --db p.db
    python benchmarks/lm_harness.py spec-bench.jsonl --db p.db --samples 50

The exit status is 1 if any output differs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import nn

# A task: of which classes its prompts are, as what the model reads them, where its
# answers end. The first is gsm8k's form, the second a user's message.
TASKS: dict[str, dict[str, Any]] = {
    "short_answers": {
        "classes": ("math_reasoning", "qa"),
        "doc_to_text": "Question: {{prompt}}\nAnswer:",
        "until": ["Question:", "\n\n"],
        "chat": False,
    },
    "rewriting": {
        "classes": ("summarization", "translation"),
        "doc_to_text": "{{prompt}}",
        "until": ["\n\n"],
        "chat": True,
    },
}


@dataclass
class Side:
    """One way to decode, and what it has generated and taken so far.

    Args:
        answers: Task and number of the sample -> the text that the harness scores.
        tokens: Generated, padding aside.
        seconds: Of wall time in ``generate``.
        processor_seconds: Of this process in ``generate``, over all threads.
    """

    harness: Any
    answers: dict[tuple[str, int], str] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0


def prompts_of(workload: Path, classes: Sequence[str], count: int) -> list[str]:
    """The first prompts of a workload's classes, in turns."""
    found: dict[str, list[str]] = {name: [] for name in classes}
    for line in workload.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["class"] in found:
            found[record["class"]].append(record["messages"][-1]["content"])
    turns = [p for several in zip(*found.values(), strict=False) for p in several]
    if len(turns) < count:
        raise click.BadParameter(
            f"{workload} has {len(turns)} prompts of {', '.join(classes)}, "
            f"got --samples {count}"
        )
    return turns[:count]


def write_task(folder: Path, name: str, prompts: Sequence[str], tokens: int) -> None:
    """A task as the harness reads it: a YAML file, and its documents beside it."""
    documents = folder / f"{name}.jsonl"
    documents.write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts),
        encoding="utf-8",
    )
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": TASKS[name]["doc_to_text"],
        "doc_to_target": "",
        "generation_kwargs": {
            "until": TASKS[name]["until"],
            "do_sample": False,
            "max_gen_toks": tokens,
        },
        "metric_list": [{"metric": "bypass"}],
        "metadata": {"version": 1.0},
    }
    # YAML holds all of JSON.
    (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")


def side_of(model: nn.Module, tokenizer: Any, batch: int) -> Side:
    """The harness's ``hf`` model around a model, with a watch on ``generate``."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        def _model_generate(self, context: Any, *args: Any, **given: Any) -> Any:
            started, used = time.perf_counter(), time.process_time()
            found = super()._model_generate(context, *args, **given)
            side.seconds += time.perf_counter() - started
            side.processor_seconds += time.process_time() - used
            new = found[:, context.shape[1] :]
            side.tokens += int((new != self.tokenizer.pad_token_id).sum())
            return found

    side = Side(Watched(pretrained=model, tokenizer=tokenizer, batch_size=batch))
    return side


def run(side: Side, manager: Any, name: str, samples: Sequence[int]) -> None:
    """Let the harness answer these samples of a task."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=side.harness,
        tasks=[name],
        samples={name: list(samples)},
        task_manager=manager,
        apply_chat_template=TASKS[name]["chat"],
        bootstrap_iters=0,
        predict_only=True,
    )
    for sample in found["samples"][name]:
        (text,) = sample["resps"][0]
        side.answers[name, sample["doc_id"]] = text


def in_turns(count: int, size: int) -> Iterator[range]:
    """Samples in groups of ``size``."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


@click.command()
@click.argument(
    "workload", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("-m", "--model", help="Model folder; default: the embedded model.")
@click.option("--draft-model", help="Draft model folder.")
@click.option("--db", help="Profile database.")
@click.option("-s", "--strategy", help="Use this one, whatever was measured.")
@click.option("--samples", default=50, show_default=True, help="Of each task.")
@click.option("--tokens", default=64, show_default=True, help="Most of an answer.")
@click.option("--batch", default=1, show_default=True, help="The harness's batch size.")
@click.option("--turn", default=10, show_default=True, help="Samples of a turn.")
def main(
    workload: Path,
    model: str | None,
    draft_model: str | None,
    db: str | None,
    strategy: str | None,
    samples: int,
    tokens: int,
    batch: int,
    turn: int,
) -> None:
    """Run WORKLOAD's prompts as two of the harness's tasks, plainly and sped up."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import torch
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import adaptspec
    from adaptspec.default_model import default_model_path

    path = model or str(default_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    sides = []
    for fast in (False, True):
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if fast:
            adaptspec.speed_up(
                loaded, tokenizer, strategy=strategy, draft_model=draft_model, db=db
            )
        sides.append(side_of(loaded, tokenizer, batch))
    plain, fast_one = sides
    print(f"{samples} samples a task, {tokens} tokens at most, batches of {batch}")
    print("task | samples | tokens | equal | plain s | AdaptSpec s | ratio | CPU ratio")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        for name, task in TASKS.items():
            prompts = prompts_of(workload, task["classes"], samples)
            write_task(Path(folder), name, prompts, tokens)
        manager = TaskManager(include_path=folder, include_defaults=False)
        for name in TASKS:
            before = [(s.tokens, s.seconds, s.processor_seconds) for s in sides]
            for number, group in enumerate(in_turns(samples, turn)):
                for side in sides if number % 2 == 0 else reversed(sides):
                    run(side, manager, name, group)
            took = [
                (s.tokens - t, s.seconds - w, s.processor_seconds - c)
                for s, (t, w, c) in zip(sides, before, strict=True)
            ]
            keys = [key for key in plain.answers if key[0] == name]
            differ = [k for k in keys if plain.answers[k] != fast_one.answers[k]]
            wrong += len(differ)
            (count, slow, slow_cpu), (_, quick, quick_cpu) = took
            print(
                f"{name} | {len(keys)} | {count} | {len(keys) - len(differ)} | "
                f"{slow:.1f} | {quick:.1f} | {slow / quick:.2f} | "
                f"{slow_cpu / quick_cpu:.2f}",
                flush=True,
            )
            for key in differ:
                print(f"  {key}: {plain.answers[key]!r} {fast_one.answers[key]!r}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
