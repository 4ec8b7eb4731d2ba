"""Chooses an engine's threads by plain decoding, before its settings are measured.

Threads change plain decoding as well, so they can't be one more parameter of a method:
a ratio to plain decoding with other threads says nothing of the method. They are chosen
once, and all settings are measured with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptspec.engines.inference_engine import PLAIN_METHOD
from adaptspec.errors import EngineError
from adaptspec.workloads import split
from adaptspec_tuner.tuning_run import run_id

if TYPE_CHECKING:
    from adaptspec.cli.progress import Progress
    from adaptspec.engines.inference_engine import InferenceEngine
    from adaptspec.profile import Environment, ProfileStore
    from adaptspec.workloads import Prompt, Workload
    from adaptspec_tuner.options import TuneOptions

THREADS = "threads"  # the run's record of what was chosen


@dataclass(frozen=True)
class Threads:
    """How many of an engine's threads compute.

    Args:
        threads: Forwards of one token.
        batch_threads: Forwards of several: prompts, drafts that are verified, and
            requests that are answered at the same time.
    """

    threads: int
    batch_threads: int


@dataclass
class _Seconds:
    """What plain answers took with one number of threads: the least of each prompt."""

    first: dict[str, float]
    rest: dict[str, float]

    def add(self, prompt: Prompt, first: float, whole: float) -> None:
        for least, seconds in ((self.first, first), (self.rest, whole - first)):
            least[prompt.id] = min(seconds, least.get(prompt.id, seconds))


def choose_threads(
    engine: InferenceEngine,
    prompts: Sequence[Prompt],
    concurrency: int = 1,
    *,
    tokens: int = 16,
    repeats: int = 2,
    least_gain: float = 0.05,
) -> Threads | None:
    """Try the engine's ``thread_counts`` in turns, and use the fastest.

    With one request at a time the first token comes of forwards of several tokens, the
    others of one each, so that both numbers are seen apart. With several requests all
    forwards are of several tokens.

    Args:
        prompts: What is answered, each ``repeats`` times; other programs only add to
            a time, so a prompt's least counts.
        concurrency: Requests at the same time.
        tokens: Of each answer.
        least_gain: How much less time than the engine's own number, the first of
            ``thread_counts``, another one must take: 0.05 is 5%.

    Returns:
        What the engine uses now; None where there is nothing to choose.

    Raises:
        EngineError: if the engine's own number can't decode.
    """
    counts = list(engine.thread_counts)
    if len(counts) < 2 or not prompts:
        return None
    took = {count: _Seconds({}, {}) for count in counts}
    prompts = [replace(prompt, max_new_tokens=tokens) for prompt in prompts]
    for turn in range(repeats):
        for prompt in prompts:
            for count in counts if turn % 2 == 0 else counts[::-1]:
                if count not in took:
                    continue
                engine.use_threads(count, count)
                try:
                    answers = engine.answer(
                        PLAIN_METHOD.name, {}, [prompt] * concurrency, tokens
                    )
                except EngineError:
                    if count == counts[0]:
                        raise
                    del took[count]
                    continue
                first = max(answer.seconds_to_first for answer in answers)
                whole = max(answer.seconds for answer in answers)
                took[count].add(prompt, first, whole)
    firsts = {count: sum(of.first.values()) for count, of in took.items()}
    rests = {count: sum(of.rest.values()) for count, of in took.items()}
    if concurrency > 1:
        both = {count: firsts[count] + rests[count] for count in took}
        batch = _fastest(both, counts[0], least_gain)
        found = Threads(batch, batch)
    else:
        found = Threads(
            _fastest(rests, counts[0], least_gain),
            _fastest(firsts, counts[0], least_gain),
        )
    engine.use_threads(found.threads, found.batch_threads)
    return found


def _fastest(seconds: dict[int, float], usual: int, least_gain: float) -> int:
    best = min(seconds, key=lambda count: seconds[count])
    return best if seconds[best] <= (1 - least_gain) * seconds[usual] else usual


def settle_threads(
    engine: InferenceEngine,
    workload: Workload,
    store: ProfileStore,
    options: TuneOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Choose an engine's threads, or take those that the same tune chose before.

    They are tried on a short prompt and on one of middle length, of those that are
    tuned on; on a shorter one where the engine takes the short prompt alone.

    Returns:
        The options that say the same; empty where there was nothing to choose.

    Raises:
        EngineError: if the engine's own number can't decode the short prompt either.
    """
    if len(engine.thread_counts) < 2:
        return {}
    run = run_id(environment_at(engine, options), workload, options)
    record = None if options.fresh else store.record(run, THREADS)
    found = None
    with suppress(TypeError):  # another version's record
        found = None if record is None else Threads(**record)
    if found is not None:
        engine.use_threads(found.threads, found.batch_threads)
    else:
        progress.doing("threads", options.seconds)
        ranked = sorted(split(workload)[0].prompts, key=lambda p: len(str(p.content)))
        middle = len(ranked) // 2
        while found is None:
            asked = dict.fromkeys([ranked[middle], ranked[0]])
            try:
                found = choose_threads(engine, list(asked), options.concurrency)
            except EngineError:
                if middle == 0:
                    raise
                # Unless the shortest is answered, the prompt's length isn't the reason.
                one = replace(ranked[0], max_new_tokens=1)
                engine.answer(PLAIN_METHOD.name, {}, [one] * options.concurrency, 1)
                middle //= 2
        store.put_record(run, THREADS, asdict(found))
    return asdict(found)


def environment_at(engine: InferenceEngine, options: TuneOptions) -> Environment:
    """What a tune's measurements hold for: the engine at the tune's load."""
    return replace(engine.environment, concurrency=max(1, options.concurrency))
