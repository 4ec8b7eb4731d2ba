"""From a model and data to heads on disk: answers, features, training, report."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaptspec.cli.progress import Progress
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.generation_fields import ONE_SEQUENCE
from adaptspec.errors import TrainingError
from adaptspec.heads.checkpoints import check_folder, write_heads
from adaptspec.heads.medusa import MedusaHeads
from adaptspec.model.language_model import LanguageModel
from adaptspec.workloads import Prompt, Workload
from adaptspec_training.answering import Answers
from adaptspec_training.conversations import (
    Example,
    encode_conversation,
    read_data,
    with_answers,
    without_answers,
)
from adaptspec_training.corpus import Corpus, keeps_features
from adaptspec_training.heads_trainee import (
    PATHS,
    RANKS,
    HeadsTrainee,
    accuracies,
    draft_vocabulary,
    rank_paths,
    rank_shares,
)
from adaptspec_training.lora import (
    HEADS_WEIGHT,
    HEADS_WEIGHT_DISTILLED,
    JointTrainee,
    with_adapters,
)
from adaptspec_training.options import (
    Options,
    check_options,
    digest,
    has_fast_bfloat16,
    load_target,
    target_problem,
)
from adaptspec_training.report import write_report
from adaptspec_training.self_prompts import write_prompts
from adaptspec_training.trainer import (
    Batch,
    Schedule,
    Trainer,
    in_batches,
    out_of_memory,
)

SHARE_OF_DISK = 0.5  # of what is free, for hidden states, with --features auto
MOST_HELD_OUT = 200  # prompts


@dataclass(frozen=True)
class Trained:
    """What a run gave."""

    folder: Path
    report: dict[str, Any] = field(default_factory=dict)


def train_medusa(
    model: str | Path | LanguageModel,
    data: Path | Workload | None,
    out: Path,
    options: Options | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    load_in: str | None = None,
    trust_remote_code: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Train Medusa heads for ``model`` on its own answers, or on those given.

    The same call continues what was cut off. ``out`` then holds the heads, their
    calibration, ``report.json``, ``report.html`` and, in ``work/``, what only
    continuing needs; with medusa-2 the adapted target is in ``out/model``.

    Args:
        data: Prompts or conversations; None: the model's own (``self_prompts``).
        load_in: ``4bit`` or ``8bit``: quantise the frozen target (bitsandbytes).
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        AdaptSpecError: for a bad option, model or data, or too little memory.
    """
    options = options or Options()
    progress = progress or Progress(None, clock)
    check_options(options, data, load_in)
    if isinstance(data, Path):
        data = read_data(
            data, progress.say
        )  # a bad line is told before a model is loaded
    work = out / "work"
    if fresh and work.exists():
        shutil.rmtree(work)
    check_folder(out)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"can't make the folder {work}: {error.strerror or error}; choose another "
            "--out"
        ) from error
    target = (
        model
        if isinstance(model, LanguageModel)
        else load_target(model, dtype, device, load_in, trust_remote_code)
    )
    if reason := target_problem(target):
        raise TrainingError(reason)
    run = _Run(target, out, work, options, progress, clock)
    run.borrowed = isinstance(model, LanguageModel)
    with progress:
        return run(data)


class _Run:
    def __init__(
        self,
        target: LanguageModel,
        out: Path,
        work: Path,
        options: Options,
        progress: Progress,
        clock: Callable[[], float],
    ) -> None:
        self._target, self._out, self._work = target, out, work
        self._options, self._progress, self._clock = options, progress, clock
        self.borrowed = False  # the target is the caller's and stays as it is
        self._spent: dict[str, float] = {}
        self._cpu = time.process_time()

    def __call__(self, data: Workload | None) -> Trained:
        options, target = self._options, self._target
        if data is None:
            with self._spending("prompts"), out_of_memory("--answer-batch"):
                data = write_prompts(
                    target,
                    options.self_prompts,
                    self._work / f"prompts-{options.self_prompts}-{options.seed}.jsonl",
                    seed=options.seed,
                    batch=options.answer_batch,
                    tell=lambda text: self._progress.doing(text, float("inf")),
                )
        given = options.answers == "given" or (
            options.answers == "auto" and with_answers(data)
        )
        if options.answers == "given" and not with_answers(data):
            raise TrainingError(
                "--answers given needs conversations that end with an assistant "
                "message, got prompts only; pass --answers self"
            )
        made_by = self._fingerprint(data, given)
        corpus = self._corpus(data, given, made_by)
        self._spent["answers"] = corpus.seconds
        if not corpus.examples:
            raise TrainingError("no answer has a token to learn from; see the data")
        train, held_out = _split(corpus.examples, options)
        heads = self._new_heads([corpus.examples[i] for i in train])
        autocast = self._autocast()
        trainee = HeadsTrainee(
            heads,
            self._features(corpus),
            target.vocab_size,
            lm_head=self._lm_head() if options.output == "base" else None,
            decay=options.decay,
            factor=options.heads_factor,
            chunk=options.chunk,
            autocast=autocast,
        )
        identity = digest(
            [
                made_by,
                len(corpus.examples),
                asdict(options),
                str(autocast),
                target.digest,
            ]
        )
        log = self._trainer(trainee, corpus, train, held_out, "heads", identity)
        batches = in_batches(corpus.examples, held_out, options.batch_tokens)
        guarded: dict[str, Any] = {}
        base_name = target.name
        if options.method == "medusa-2":
            more, ranks, guarded = self._joint(
                trainee, corpus, train, held_out, batches, given, identity
            )
            log, base_name = [*log, *more], "model"
        else:
            ranks = trainee.ranks(batches)
        paths, shares = rank_paths(ranks, RANKS, PATHS), rank_shares(ranks, RANKS)
        report = self._report(corpus, train, held_out, heads, log, paths, shares)
        report["heads"] = accuracies(ranks)
        report.update(guarded)
        stored = heads.to(target.dtype)
        write_heads(
            self._out,
            stored,
            base_model=base_name,
            vocab_size=target.vocab_size,
            paths=tuple(paths),
            ranks=tuple(tuple(row) for row in shares),
            record=report["training"],
        )
        write_report(self._out, report)
        return Trained(self._out, report)

    def _corpus(self, data: Workload, given: bool, made_by: str) -> Corpus:
        options, target = self._options, self._target
        prompts = [
            (f"{prompt.id}#{sample}", prompt)
            for sample in range(1 if given else options.samples)
            for prompt in (data if given else without_answers(data)).prompts
        ]
        most = sum(p.max_new_tokens or options.max_new_tokens for _, p in prompts)
        folder = self._work / "answers"
        width = self._hidden_size() if self._stores(most, folder) else 0
        corpus = Corpus(folder, width, target.dtype, made_by)
        if given:
            self._read(corpus, prompts)
        else:
            self._answer(corpus, prompts)
        return corpus

    def _answer(self, corpus: Corpus, prompts: Sequence[tuple[str, Prompt]]) -> None:
        options, target = self._options, self._target
        ends = Controls.for_model(target, **ONE_SEQUENCE).eos_token_ids
        answers = Answers(
            target, options.temperature, options.seed, ends, corpus.has_features
        )
        longest = min(options.max_length, target.max_length or options.max_length)
        encoded = []
        for name, prompt in prompts:
            ids = prompt.encode(target)
            room = longest - len(ids)
            limit = min(prompt.max_new_tokens or options.max_new_tokens, room)
            if limit >= 1:
                encoded.append((name, ids, limit))
        if out := len(prompts) - len(encoded):
            self._progress.say(
                f"{out} of {len(prompts)} prompts leave no room for an answer in "
                f"{longest} tokens and are left out (--max-length)"
            )
        # Neighbours of one length waste no padding; groups come in a drawn order, so
        # that a run that time cuts short has seen prompts of every length.
        size = min(options.answer_batch, answers.most_at_once or options.answer_batch)
        encoded.sort(key=lambda item: (len(item[1]), item[0]))
        groups = [encoded[i : i + size] for i in range(0, len(encoded), size)]
        groups.sort(key=lambda group: digest([options.seed, group[0][0]]))
        done_before, spent_before = corpus.batches, corpus.seconds
        for at in range(corpus.batches, len(groups)):
            # Of all processes: a run that continues another has no new budget.
            budget = options.answer_seconds
            if budget is not None and corpus.seconds >= budget:
                self._progress.say(
                    f"{at} of {len(groups)} batches answered in the time given"
                )
                break
            each = (corpus.seconds - spent_before) / max(1, at - done_before)
            left = each * (len(groups) - at) if at > done_before else float("inf")
            self._progress.doing(
                f"answering, {corpus.positions} tokens so far, "
                f"batch {at + 1} of {len(groups)}",
                left,
            )
            group = groups[at]
            began = self._clock()
            with out_of_memory("--answer-batch"):
                made = answers.answer(
                    [name for name, _, _ in group],
                    [ids for _, ids, _ in group],
                    [limit for _, _, limit in group],
                )
            corpus.append(*made, seconds=self._clock() - began)

    def _read(self, corpus: Corpus, prompts: Sequence[tuple[str, Prompt]]) -> None:
        size = self._options.answer_batch
        for at in range(corpus.batches, -(-len(prompts) // size)):
            self._progress.doing(f"reading answers, {corpus.positions} so far", 1e999)
            some = prompts[at * size : (at + 1) * size]
            began = self._clock()
            examples = []
            for name, prompt in some:
                length = min(
                    self._options.max_length, self._target.max_length or 1 << 30
                )
                example = encode_conversation(self._target, prompt, length)
                if example is not None:
                    examples.append(Example(name, example.tokens, example.spans))
            states = []
            if corpus.has_features:
                with out_of_memory("--max-length"):
                    states = [self._hidden(example) for example in examples]
            corpus.append(examples, states, seconds=self._clock() - began)

    def _hidden(self, example: Example) -> torch.Tensor:
        """Features by a forward over the whole example."""
        forward = self._target.read_alone(example.tokens, hidden_layers=(-1,))
        found = forward.hidden[-1][torch.tensor(example.positions)]
        return found.clone()

    def _features(self, corpus: Corpus) -> Callable[[int, Example], torch.Tensor]:
        if corpus.has_features:
            return lambda index, _: corpus.hidden(index)
        return lambda _, example: self._hidden(example).detach().clone()

    def _new_heads(self, examples: Sequence[Example]) -> MedusaHeads:
        options, target = self._options, self._target
        weight = self._lm_head().weight
        size = min(options.draft_vocab or target.vocab_size, target.vocab_size)
        reduced = size < target.vocab_size and options.output != "base"
        torch.manual_seed(options.seed)
        heads = MedusaHeads(
            weight.shape[1],
            size if reduced else target.vocab_size,
            options.heads,
            options.layers,
            options.output,
            draft_vocabulary(examples, size, target.vocab_size) if reduced else None,
        )
        heads.copy_outputs(weight.detach().float().cpu())
        return heads.float().to(target.device)

    def _trainer(
        self,
        trainee: Any,
        corpus: Corpus,
        train: Sequence[int],
        held_out: Sequence[int],
        stage: str,
        identity: str,
    ) -> list[dict[str, Any]]:
        options = self._options
        schedule = Schedule(
            epochs=options.epochs if stage == "heads" else options.joint_epochs,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
            batch_tokens=options.batch_tokens,
            seed=options.seed,
        )

        def tell(step: int, steps: int, loss: float, left: float) -> None:
            self._progress.doing(
                f"training {stage}, step {step} of {steps}, loss {loss:.3f}", left
            )

        log = Trainer(
            trainee,
            corpus.examples,
            train,
            held_out,
            schedule,
            self._work,
            fingerprint=identity,
            device=self._target.device,
            clock=self._clock,
            tell=tell,
            stage=stage,
        ).run()
        self._spent[stage] = log[-1].get("seconds", 0.0)
        return log

    def _joint(
        self,
        heads: HeadsTrainee,
        corpus: Corpus,
        train: Sequence[int],
        held_out: Sequence[int],
        batches: Sequence[Batch],
        given: bool,
        identity: str,
    ) -> tuple[list[dict[str, Any]], torch.Tensor, dict[str, Any]]:
        """Stage 2: train, merge the adapters, save the target.

        Returns:
            The log, the heads' ranks on the stored target's held-out states, and what
            became of the target's own loss.
        """
        options, target = self._options, self._target
        weight = options.heads_weight
        if weight is None:
            weight = HEADS_WEIGHT if given else HEADS_WEIGHT_DISTILLED
        adapted = with_adapters(
            copy.deepcopy(target.model) if self.borrowed else target.model
        )
        joint = JointTrainee(
            adapted,
            heads,
            distilled=not given,
            heads_weight=weight,
            own=self._features(corpus) if corpus.has_features else None,
            most_tokens=options.chunk,
        )
        with out_of_memory(joint.lowers_memory), adapted.disable_adapter():
            _, before = joint.measure(batches)
        log = self._trainer(joint, corpus, train, held_out, "joint", identity)
        with self._spending("saving"), out_of_memory(joint.lowers_memory):
            merged = joint.merge()
            ranks, after = joint.measure(batches)
            joint.close()
            merged.save_pretrained(self._out / "model")
            if target.tokenizer is not None:
                target.tokenizer.save_pretrained(self._out / "model")
        return log, ranks, {"target_loss": {"before": before, "after": after}}

    def _report(
        self,
        corpus: Corpus,
        train: Sequence[int],
        held_out: Sequence[int],
        heads: MedusaHeads,
        log: Sequence[dict[str, Any]],
        paths: Sequence[tuple[tuple[int, ...], float]],
        shares: Sequence[Sequence[float]],
    ) -> dict[str, Any]:
        known = None if heads.token_map is None else set(heads.token_map.tolist())
        answers = [
            token
            for i in held_out
            for start, end in corpus.examples[i].spans
            for token in corpus.examples[i].tokens[start:end]
        ]
        covered = sum(known is None or token in known for token in answers)
        return {
            "training": {
                "target": self._target.name,
                "target_digest": self._target.digest,
                "options": asdict(self._options),
                "examples": len(train),
                "tokens": sum(len(corpus.examples[i].positions) for i in train),
                "held_out_examples": len(held_out),
                "held_out_tokens": len(answers),
                "held_out_covered": covered / max(1, len(answers)),
                "seconds": dict(self._spent),
                "cpu_seconds": time.process_time() - self._cpu,
                "threads": torch.get_num_threads(),
                "precision": str(self._autocast() or torch.float32),
            },
            "log": list(log),
            "ranks": [list(row) for row in shares],
            "paths": [[list(path), share] for path, share in paths],
        }

    def _spending(self, name: str) -> Any:
        return _spending(self._spent, name, self._clock)

    def _stores(self, tokens: int, answers: Path) -> bool:
        choice = self._options.features
        if choice != "auto":
            return choice == "store"
        if (settled := keeps_features(answers)) is not None:
            return settled
        size = tokens * self._hidden_size() * self._target.dtype.itemsize
        return size <= SHARE_OF_DISK * shutil.disk_usage(self._work).free

    def _hidden_size(self) -> int:
        return int(self._lm_head().weight.shape[1])

    def _lm_head(self) -> Any:
        model: Any = self._target.model
        return model.get_output_embeddings()

    def _autocast(self) -> torch.dtype | None:
        choice = self._options.precision
        if choice == "float32":
            return None
        if choice == "bfloat16":
            return torch.bfloat16
        if self._target.dtype is torch.float32:
            return None
        return torch.bfloat16 if has_fast_bfloat16(self._target.device) else None

    def _fingerprint(self, data: Workload, given: bool) -> str:
        """What decides the answers and their features."""
        names = ("samples", "temperature", "max_new_tokens", "answer_batch", "seed")
        chosen = {name: getattr(self._options, name) for name in names}
        return digest(
            [data.digest, given, self._target.digest, self._options.max_length, chosen]
        )


@contextmanager
def _spending(
    spent: dict[str, float], name: str, clock: Callable[[], float]
) -> Iterator[None]:
    """Adds the seconds inside to a named sum."""
    began = clock()
    try:
        yield
    finally:
        spent[name] = spent.get(name, 0.0) + clock() - began


def _split(
    examples: Sequence[Example], options: Options
) -> tuple[list[int], list[int]]:
    """Indices to train and to measure on; all samples of a prompt on one side."""
    prompts = sorted(
        {e.id.rpartition("#")[0] for e in examples},
        key=lambda name: digest([options.seed, name]),
    )
    if len(prompts) < 2:
        raise TrainingError(
            "at least two prompts are needed, one of them to measure on, "
            f"got {len(prompts)}"
        )
    wanted = min(MOST_HELD_OUT, round(len(prompts) * options.held_out))
    most = max(1, min(len(prompts) - 1, wanted))
    chosen = set(prompts[:most])
    train = [i for i, e in enumerate(examples) if e.id.rpartition("#")[0] not in chosen]
    rest = [i for i, e in enumerate(examples) if e.id.rpartition("#")[0] in chosen]
    return train, rest
