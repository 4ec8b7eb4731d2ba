"""What may be asked of a tune: options that fit, strategies, prompts, a store."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    get_args,
    get_origin,
    get_type_hints,
)

from adaptspec.cli.quantities import parse_memory
from adaptspec.errors import AdaptSpecError, UnknownStrategyError
from adaptspec.params import Scalar
from adaptspec.profile import ANSWER, LATENCY, OURS, PLAIN, ProfileStore
from adaptspec.workloads import Workload, example_workload, read_workload
from adaptspec_tuner.distributed.grpc_store import SCHEME, RemoteStore, open_remote

if TYPE_CHECKING:
    from adaptspec.host import Host
    from adaptspec.strategy import Strategy

EXAMPLE_TOKENS = 48
# Options that say nothing of our own engine.
OF_OTHER_ENGINES = (
    *("engine_command", "engine_python", "engine_argument"),
    *("context", "concurrency", "batch_threads", "api_key"),
)


def names_in(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",")]


def numbers_in(text: str) -> tuple[int, ...]:
    """Different whole numbers from 1 separated by commas, in the order given.

    Raises:
        AdaptSpecError: for anything else.
    """
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in names_in(str(text))))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise AdaptSpecError(
            f"whole numbers from 1, separated by commas, are wanted, got {text!r}"
        )
    return numbers


def named_values(
    context: object, option: object, pairs: Sequence[tuple[str, str]]
) -> list[tuple[str, Any]]:
    """Names with values that are JSON, or else texts; a callback of ``click``."""
    found = []
    for name, text in pairs:
        try:
            found.append((name, json.loads(text)))
        except ValueError:
            found.append((name, text))
    return found


class Asked:
    """How the command asks for a field of :class:`TuneOptions`.

    Args:
        flags: In place of ``--`` and the field's name.
        least: The smallest number that is allowed.
        how: More keywords of ``click.option``.
    """

    def __init__(
        self, help: str, *flags: str, least: int | None = None, **how: Any
    ) -> None:
        self.help, self.flags, self.least, self.how = help, flags, least, how


@dataclass(frozen=True)
class TuneOptions:
    """What a tune is asked; the command's options and the run's id are made of it.

    Args:
        budget: Seconds, loading included.
        budget_trials: Measured trials in all, in place of ``budget``.
        max_memory: Bytes.

    Raises:
        AdaptSpecError: for values that aren't known or don't go together.
    """

    budget: float = 480.0
    budget_trials: int | None = None
    engine: Annotated[
        str,
        Asked(
            "The engine that is tuned, or the URL of an OpenAI-compatible server that "
            "is measured.",
            metavar="NAME|URL",
        ),
    ] = OURS
    engine_command: Annotated[
        str | None, Asked("Another engine's program.", metavar="PROGRAM")
    ] = None
    engine_python: Annotated[
        str | None,
        Asked("Python that another engine is installed for.", metavar="PROGRAM"),
    ] = None
    engine_argument: Annotated[
        Sequence[str],
        Asked(
            "One more argument of another engine's program; as --engine-argument=--X.",
            multiple=True,
            metavar="TEXT",
        ),
    ] = ()
    context: Annotated[
        int | None,
        Asked("Another engine's tokens of a prompt with its answer.", least=1),
    ] = None
    concurrency: Annotated[
        int,
        Asked(
            "Requests at a time, of another engine: several numbers are several tunes "
            "in one budget.",
            least=1,
            type=numbers_in,
            metavar="1,4,16",
        ),
    ] = 1
    api_key: Annotated[str | None, Asked("For a server that wants one.")] = field(
        default=None, repr=False
    )
    heads: Annotated[
        Sequence[Path | str],
        Asked("Heads trained for the model.", multiple=True, metavar="DIR"),
    ] = ()
    objective: Annotated[
        Literal["answer", "speed", "latency"],
        Asked(
            "Time of the whole answer, tokens per second after the first, or the 95th "
            "percentile of the time per token."
        ),
    ] = "answer"
    max_memory: Annotated[
        int | None,
        Asked(
            "Refuse settings that take more: 6GiB, 800MiB...",
            type=parse_memory,
            metavar="TEXT",
        ),
    ] = None
    strategies: Annotated[
        Sequence[str] | None,
        Asked("Only these, separated by commas.", type=names_in, metavar="TEXT"),
    ] = None
    allow_lossy: Annotated[
        bool, Asked("Measure, never choose, strategies that change sampled output.")
    ] = False
    trials: Annotated[int, Asked("Most trials per class and strategy.", least=1)] = 40
    max_new_tokens: Annotated[
        int,
        Asked(
            "Most new tokens where a prompt doesn't say.",
            "-n",
            "--max-new-tokens",
            least=2,
        ),
    ] = 64
    dtype: Annotated[str, Asked("auto: as the weights are stored.")] = "auto"
    device: Annotated[
        str | None, Asked("Default: CUDA if there is one, else the CPU.")
    ] = None
    trust_remote_code: Annotated[
        bool,
        Asked("Run code that comes with a model. Only for models you trust."),
    ] = False
    threads: Annotated[
        int | None, Asked("Threads of torch, or of another engine.", least=1)
    ] = None
    batch_threads: Annotated[
        int | None,
        Asked("Another engine's threads for forwards of several tokens.", least=1),
    ] = None
    compile: Annotated[
        bool,
        Asked("Run norms and MLPs as torch.compile makes them; the first time waits."),
    ] = False
    temperature: Annotated[
        float, Asked("Decode as your requests do; 0 is greedy.", "-t", "--temperature")
    ] = 0.0
    top_k: Annotated[
        int | None, Asked("Sample from this many likeliest tokens.", type=int)
    ] = None
    top_p: Annotated[
        float | None,
        Asked("Sample from the likeliest tokens of this probability.", type=float),
    ] = None
    control: Annotated[
        Sequence[tuple[str, Scalar | None]],
        Asked(
            "Any other generation control; VALUE is JSON, null is off.",
            "-c",
            "--control",
            nargs=2,
            multiple=True,
            metavar="NAME VALUE",
            callback=named_values,
        ),
    ] = ()
    seed: Annotated[int, Asked("Seed of the search, and of sampling.")] = 0
    limit: Annotated[
        int | None,
        Asked(
            "Most prompts per class. A strategy needs 4, 2 of them held out, to win.",
            least=1,
        ),
    ] = None
    skip_bad: Annotated[
        bool,
        Asked("Leave out prompts that can't be read or decoded; they are counted."),
    ] = False
    baselines: Annotated[
        bool, Asked("Also measure other engines.", "--baselines/--no-baselines")
    ] = False
    fresh: Annotated[bool, Asked("Begin anew instead of continuing an equal run.")] = (
        False
    )
    worker: Annotated[
        bool,
        Asked(
            "Run trials of an equal tune, started elsewhere on the same --db, or on "
            "what `profiles serve` serves (grpc://HOST:PORT)."
        ),
    ] = False
    ray: Annotated[
        str | None,
        Asked(
            "Run trials on a Ray cluster's nodes of this machine's kind.",
            is_flag=False,
            flag_value="auto",
            metavar="[ADDRESS]",
        ),
    ] = None

    def __post_init__(self) -> None:
        hints = get_type_hints(TuneOptions, include_extras=True)
        for name, hint in hints.items():
            value = getattr(self, name)
            known, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if get_origin(known) is Literal and value not in get_args(known):
                choices = " or ".join(map(repr, get_args(known)))
                raise AdaptSpecError(f"{name} must be {choices}, got {value!r}")
            least = notes[0].least if notes else None
            if least is not None and value is not None and value < least:
                raise AdaptSpecError(f"{name} must be {least} or more, got {value}")
        if self.baselines and self.objective == LATENCY:
            raise AdaptSpecError(
                "baselines tell no latency of their tokens; leave --baselines out or "
                f"take --objective {ANSWER}"
            )
        if self.baselines and self.controls:
            raise AdaptSpecError(
                "baselines decode greedily; leave --baselines out, or --temperature "
                "and other controls"
            )
        if self.engine != OURS and self.compile:
            raise AdaptSpecError(
                f"compile is for our own engine, got engine={self.engine!r}; leave it "
                "out"
            )
        if self.engine == OURS:
            usual = {f.name: f.default for f in fields(self)}
            for name in OF_OTHER_ENGINES:
                if getattr(self, name) != usual[name]:
                    raise AdaptSpecError(
                        f"{name} is for other engines (engine=, --engine), and "
                        f"{OURS} is tuned; leave it out"
                    )
        if self.ray is not None and self.worker:
            raise AdaptSpecError("ray and worker share trials in two ways; take one")

    @property
    def seconds(self) -> float:
        """The budget in time: infinite where it is a number of trials."""
        return self.budget if self.budget_trials is None else math.inf

    @property
    def controls(self) -> dict[str, Scalar | None]:
        """Generation controls that are measured under; greedily if empty."""
        named = {"top_k": self.top_k, "top_p": self.top_p}
        told: dict[str, Scalar | None] = dict(self.control)
        told |= {name: value for name, value in named.items() if value is not None}
        return ({"temperature": self.temperature} if self.temperature else {}) | told

    def shared(self) -> dict[str, Any]:
        """What must be equal for the trials of two runs to be mixed, threads aside."""
        told: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "objective": self.objective,
        }
        usual = {f.name: f.default for f in fields(self)}
        for name in ("max_memory", "allow_lossy", "context"):
            if (value := getattr(self, name)) != usual[name]:
                told[name] = value
        if self.engine_argument:
            told["engine_argument"] = list(self.engine_argument)
        # What wasn't tried can't be chosen: a run of other strategies is another one.
        if self.strategies is not None:
            told["strategies"] = sorted(set(self.strategies))
        if self.controls:
            told["controls"] = self.controls
        return {**told, "seed": self.seed}


def chosen_strategies(
    host: Host, names: Sequence[str] | None, allow_lossy: bool
) -> list[type[Strategy]]:
    """Those to be tried, plain decoding aside.

    Raises:
        UnknownStrategyError: for a name that no plugin brings.
        AdaptSpecError: for a lossy one that isn't allowed.
    """
    known = {n: c for n, c in host.strategies.items() if n != PLAIN}
    if names is None:
        return [cls for cls in known.values() if cls.lossless or allow_lossy]
    if unknown := [n for n in names if n not in known and n != PLAIN]:
        raise UnknownStrategyError(
            f"no strategy {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    for name in names:
        if name != PLAIN and not (known[name].lossless or allow_lossy):
            raise AdaptSpecError(
                f"{name} is lossy: it changes the distribution of sampled output; add "
                "--allow-lossy (allow_lossy=True) to measure it"
            )
    return [known[n] for n in dict.fromkeys(names) if n != PLAIN]


def asked_prompts(workload: Workload | Path | str | None, skip_bad: bool) -> Workload:
    """The prompts of a file; the examples where none are given."""
    if workload is None:
        return _shortened(example_workload(), EXAMPLE_TOKENS)
    if isinstance(workload, Workload):
        return workload
    return read_workload(Path(workload), skip_bad)


def _shortened(workload: Workload, most: int) -> Workload:
    """The examples with shorter answers: the first try should end soon."""
    prompts = [
        replace(p, max_new_tokens=min(p.max_new_tokens or most, most))
        for p in workload.prompts
    ]
    return replace(workload, prompts=tuple(prompts))


def check_store(host: Host, db: str | ProfileStore | None, worker: bool) -> None:
    """Refuse a store that can't be written, before work is done for it.

    Raises:
        AdaptSpecError: naming it, the reason and the way out.
    """
    store = opened_store(host, db, worker)
    try:
        if not isinstance(store, RemoteStore):
            name = f"check-{uuid.uuid4().hex}"
            store.put_record(name, name, {})
            store.delete_run(name)
    finally:
        if store is not db:
            store.close()


def opened_store(
    host: Host, db: str | ProfileStore | None, worker: bool
) -> ProfileStore:
    """Where profiles are kept; only a worker may reach it through a proxy."""
    if isinstance(db, str) and db.startswith(f"{SCHEME}://"):
        store: ProfileStore = open_remote(db)
    else:
        store = host.open_store(db) if db is None or isinstance(db, str) else db
    if isinstance(store, RemoteStore) and not worker:
        store.close()
        raise AdaptSpecError(
            f"{store.url} is a proxy for --worker; the tune that leads takes the "
            "database itself with --db"
        )
    return store
